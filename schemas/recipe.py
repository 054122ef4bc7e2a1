"""The recipe: one TOML file describes a whole run. Unknown keys are errors, and the nearest known key is named.

Class defaults are the vetted settings. `train.method` is a union on `type`; schemas/methods/ has its members.
Each stage's fingerprint hashes the slice of the recipe that its outputs depend on (pipeline/stage.py).
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from schemas import templates
from schemas.address import Address
from schemas.errors import UserError
from schemas.methods import ALL, AnyMethod, DypoMethod
from schemas.methods.after_sft import AfterSFT
from schemas.methods.bridge import BRIDGEMethod
from schemas.model import Model
from schemas.scorers import ScorerConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
HUB = r"^[\w.-]+/[\w.-]+(/[^@\s]+)?(@[\w./-]+)?$"


# ---------------------------------------------------------------- prompts
Template = Annotated[
    str | None,
    AfterValidator(lambda t: None if t is None else templates.checked(t, tuple(templates.PROMPTS))),
    Field(description=f"what is asked: {' | '.join(templates.PROMPTS)}, or a text of yours with {{problem}} in it"),
]


class _Asked(Model):
    """What all sources have: the messages that a problem becomes."""

    system: str | None = Field(default=None, description="a system message put before each prompt that has none")
    template: Template = None

    @model_validator(mode="after")
    def _one_system_message(self) -> "_Asked":
        if self.system is not None and self.template is not None and templates.asked(self.template, "")[0] is not None:
            raise ValueError(
                f"template = '{self.template}' has a system message of its own, so `system` would have no place. Leave one of "
                "them out, or give template = a text of yours with {problem} in it"
            )
        return self


class FileSource(_Asked):
    """Problems from JSONL, Parquet or CSV: `prompt`+`answer`/`solution`, `messages`+`answer`, verl's columns, or options (ARC, GPQA)."""

    type: Literal["file"]
    name: str = Field(pattern=NAME)
    path: Path
    hub: str | None = Field(
        default=None,
        pattern=HUB,
        description="OWNER/NAME/FILE of a data set on the Hugging Face hub, @REVISION if need be: `dypo ingest` fetches it to `path` "
        "where there is nothing yet",
    )
    verifier: str
    split: Literal["train", "eval"] = "train"
    eval_rows: int = Field(
        default=0, ge=0, description="of a train source: this many prompts go to eval, chosen by prompt_id"
    )
    limit: int | None = Field(default=None, ge=1)
    options_seed: int = Field(default=0, description="of the order in which a multiple-choice row's options are shown")


class GymTask(Model):
    """One reasoning-gym task: its name, how many problems, and its own settings."""

    name: str
    size: int = Field(ge=1)
    settings: dict[str, Any] = {}


class GymSource(_Asked):
    """Problems from reasoning-gym tasks, generated from a seed; the verifier is type `reasoning_gym`."""

    type: Literal["reasoning_gym"]
    name: str = Field(pattern=NAME)
    tasks: list[GymTask] = Field(min_length=1)
    seed: int = 0
    verifier: str
    split: Literal["train", "eval"] = "train"
    eval_rows: int = Field(default=0, ge=0)
    suffix: str = Field(default="", description="text put after each question, for example how to give the answer")


Source = Annotated[Union[FileSource, GymSource], Field(discriminator="type")]


class Decontaminate(Model):
    """Train prompts that share a run of words with an eval prompt: table `contamination` (docs/corpora.md)."""

    ngram: int = Field(default=13, ge=2, description="words in a row that must be the same")
    action: Literal["drop", "flag"] = Field(
        default="drop", description="drop: they never reach generate; flag: rows of `contamination` alone"
    )


# ---------------------------------------------------------------- generation
class ProgramEngine(Model):
    """A solver in Python: a built-in (`tiny.left`, `worked_solution`) or the user's `path/to/file.py:function`."""

    type: Literal["program"]
    program: str
    max_failed: float = Field(default=0.02, ge=0, le=1, description="share of samples that may fail for good")


class Budget(Model):
    """What a teacher may use up in its whole stage, by the server's own count; reached: no new request, exit code 1."""

    tokens: int | None = Field(default=None, ge=1, description="completion tokens")
    cost: float | None = Field(default=None, gt=0, description="in the currency of the two prices")
    input_price: float | None = Field(default=None, ge=0, description="of a million prompt tokens")
    output_price: float | None = Field(default=None, ge=0, description="of a million completion tokens")

    @model_validator(mode="after")
    def _limits_something(self) -> "Budget":
        prices = (self.input_price, self.output_price)
        if (self.cost is None) != (prices == (None, None)) or (self.cost is not None and None in prices):
            raise ValueError("cost, input_price and output_price belong together: give all three, or tokens alone")
        if self.tokens is None and self.cost is None:
            raise ValueError("expected tokens, or cost with input_price and output_price")
        return self


class OpenAIEngine(Model):
    """Any OpenAI-compatible chat server. The key is read from the environment and never written anywhere."""

    type: Literal["openai"]
    base_url: Address
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=2048, ge=1)
    system: str | None = None
    concurrency: int = Field(default=8, ge=1)
    timeout_s: float = Field(default=120.0, gt=0)
    retries: int = Field(default=4, ge=0, description="of a request that timed out, got 429 or 5xx, or garbage")
    max_failed: float = Field(default=0.02, ge=0, le=1, description="share of samples that may fail for good")
    budget: Budget | None = None


class ReplayEngine(Model):
    """Recorded traces: LUFFY's `target`, OpenR1-Math-220k's `generations`, TRL's and verl's logs, `prompt`+`text` (docs/corpora.md)."""

    type: Literal["replay"]
    path: Path
    select: str | None = Field(default=None, description="of a target with several teachers: the one to take")
    verdict: str | None = Field(
        default=None,
        description="a recorded column that stands for the verifier's verdict on these traces: true, or 1 and more, is right",
    )


TeacherEngine = Annotated[Union[ProgramEngine, OpenAIEngine, ReplayEngine], Field(discriminator="type")]


class Teacher(Model):
    """Who writes traces, and how many for each prompt."""

    name: str = Field(pattern=NAME)
    samples: int = Field(default=1, ge=1)
    engine: TeacherEngine


class HFEngine(Model):
    """transformers on this machine: the prompt computed once for its group, a static cache, our own noise."""

    type: Literal["hf"] = "hf"
    batch_sequences: int = Field(default=256, ge=1, description="sequences decoded together; whole groups")


class VLLMEngine(Model):
    """vLLM in process. GPU machines: `pip install dypo[vllm]`."""

    type: Literal["vllm"]
    batch_sequences: int = Field(default=4096, ge=1, description="sequences handed over at once; one part file each")
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1)
    seeded: bool = Field(default=True, description="false: no seed is sent, and the rows say so (seed null)")
    enforce_eager: bool = False
    max_logprob_difference: float | None = Field(
        default=None,
        gt=0,
        description="engine against the trainer's forward, of any token; default: 0.002, in bfloat16 0.05",
    )


class VLLMServerEngine(Model):
    """A vLLM server in dev mode, whose weights are reloaded in place for each policy."""

    type: Literal["vllm_server"]
    base_url: Address = Field(description="of the server, without /v1: http://127.0.0.1:8000")
    concurrency: int = Field(default=256, ge=1, description="requests at once; a sample is one request")
    batch_sequences: int = Field(default=4096, ge=1, description="sequences asked for before a part file is written")
    timeout_s: float = Field(default=600.0, gt=0)
    retries: int = Field(default=4, ge=0, description="of one request")
    seeded: bool = Field(default=True, description="false: no seed is sent, and the rows say so (seed null)")
    max_logprob_difference: float | None = Field(
        default=None,
        gt=0,
        description="server against the trainer's forward, of any token; default: 0.002, in bfloat16 0.05",
    )


RolloutEngine = Annotated[Union[HFEngine, VLLMEngine, VLLMServerEngine], Field(discriminator="type")]


class Policy(Model):
    """The base policy: a Hugging Face folder on disk."""

    model: Path
    template: Annotated[str, AfterValidator(lambda t: templates.checked(t, templates.RENDERINGS))] = Field(
        default="chat",
        description="how messages become its text. chat: its own chat template; chat_think: that, and <think> is opened; "
        "base_think: without chat template, <think> opened; or a text of yours with {problem} in it",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="of torch on a CPU; bitwise resume holds at the same number")


class Sequential(Model):
    """Draws groups in blocks and stops one whose grade is as good as sure. Costs little error, saves some tokens (docs/refresh.md)."""

    block: int = Field(default=4, ge=1, description="rollouts drawn between two looks")
    confidence: float = Field(default=0.85, gt=0.5, lt=1, description="chance of Easy, or of Hard, at which a group stops")
    memory: float = Field(
        default=1.0, ge=0, le=1, description="what a verdict counts for a round later; 0: only this round's"
    )


class Reuse(Model):
    """Draws anew only for prompts that are Mid, moved or stale; for the others the newest stored rollouts stand (docs/refresh.md)."""

    max_age: int = Field(default=2, ge=1, description="rounds after which any prompt is drawn anew")
    token_budget: int | None = Field(
        default=None,
        ge=1,
        description="response tokens a round, as estimated from stored lengths; prompts never graded are drawn beyond it",
    )


class Rollouts(Model):
    """k rollouts of the current policy for each prompt of the round."""

    k: int = 8
    prompts_per_round: int | None = Field(
        default=None, ge=1, description="drawn anew each round; default: all train prompts"
    )
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = 1.0
    max_tokens: int = Field(default=2048, ge=1)
    max_failed: float = Field(
        default=0.02, ge=0, le=1, description="share of samples whose prompt the policy may not be able to read or answer"
    )
    logprobs: Literal["float32", "float16"] = Field(
        default="float32",
        description="float16: stored rounded to it, at a quarter less disk; a ratio is then off by 0.2 % at most where p > e^-8",
    )
    engine: RolloutEngine = HFEngine()
    sequential: Sequential | None = Field(default=None, description="default: groups are drawn whole")
    reuse: Reuse | None = Field(default=None, description="default: every prompt of a round is drawn anew")

    @field_validator("engine", mode="before")
    @classmethod
    def _not_recorded(cls, engine: Any) -> Any:
        if isinstance(engine, dict) and engine.get("type") == "replay":
            raise ValueError(
                "recorded completions cannot be training rollouts: nobody kept the sampling policy's token ids and log-probs, "
                "which the importance ratios need. Import them as traces: [[teachers]] with engine = { type = 'replay', ... }"
            )
        return engine

    @field_validator("k")
    @classmethod
    def _group(cls, k: int) -> int:
        if k < 2:
            raise ValueError(f"a group needs at least 2 rollouts to be graded mid, found k = {k}; the paper uses 8")
        return k

    @field_validator("top_p")
    @classmethod
    def _whole_support(cls, top_p: float) -> float:
        if top_p != 1.0:
            raise ValueError(
                f"training rollouts need top_p = 1, found {top_p}: truncated sampling has another support, so the "
                "importance ratios would be wrong. Set it under [eval] if you meant evaluation"
            )
        return top_p


# ---------------------------------------------------------------- judging
class Score(Model):
    """Verifiers by name, and the pool that runs them."""

    verifiers: dict[str, ScorerConfig] = Field(min_length=1)
    workers: int = Field(default=2, ge=1)
    timeout_s: float = Field(
        default=10.0, gt=0, description="for one verdict (of processor time, for math); then its process is killed"
    )
    memory_mb: int | None = Field(default=2048, ge=64, description="address space of a worker; null: no limit")
    max_failed: float = Field(default=0.1, ge=0, le=1, description="share of verdicts that may be timeout or error")
    max_truncated: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of a round's rollouts that may be cut at their length limit; past it grade refuses",
    )


class Grade(Model):
    """Thresholds on integer success counts, so no float decides a grade."""

    hard_max_successes: int = Field(default=0, ge=0, description="at most this many right: hard")
    easy_max_failures: int = Field(default=0, ge=0, description="at most this many wrong: easy")
    max_tokens: int = Field(default=8192, ge=1, description="prompt + response; longer traces and groups are not trained on")
    unjudged_to_routes: bool = Field(default=False, description="route groups with a timeout, error or gold_bad verdict too")
    memory_mb: int = Field(default=384, ge=128, description="for DuckDB while grading; what does not fit goes to disk")
    curriculum: Literal["uniform", "pass_rate", "transition"] | Path = Field(
        default="uniform",
        description="a prompt's weight, which multiplies its gates; or a .sql file of yours with prompt_id and weight",
    )
    query: Path | None = Field(default=None, description="a .sql file of yours with the columns of grades")


# ---------------------------------------------------------------- training
class Optimizer(Model):
    """AdamW, warm-up and decay over the whole run's steps (rounds * steps)."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="of lr, reached at the last step of the run")


class Lora(Model):
    """A LoRA adapter (peft) on the base policy, instead of all weights; for the whole run."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1, description="the adapter's output is scaled by alpha / rank")
    target_modules: str | list[str] = Field(default="all-linear", description="peft's; the output head is left out")


class Train(Model):
    """One round of training on that round's shards."""

    steps: int = Field(ge=1, description="optimizer steps in a round")
    prompts_per_step: int = Field(ge=1, description="gated prompts (Hard and Mid together) in a step")
    micro_batch_tokens: int = Field(
        default=16384, ge=1, description="token slots in one forward, on each process; the gradient does not depend on it"
    )
    gradient_checkpointing: bool = Field(default=False, description="keep each layer's input only, and run it twice")
    processes: int = Field(default=1, ge=1, description="ranks on this machine, started as torchrun does")
    spread: Literal["ddp", "fsdp"] = Field(
        default="fsdp", description="of several processes: each holds the model, or a share of each layer (FSDP2)"
    )
    lora: Lora | None = None
    base_weight: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="the run's last policy is the mean of what was trained and the base policy, in which the base weighs this",
    )
    checkpoint_every: int = Field(default=50, ge=1)
    min_ess: float = Field(default=0.0, ge=0, le=1, description="end the round when a step's effective sample size is below")
    max_logprob_difference: float = Field(
        default=0.05,
        gt=0,
        description="mean |trainer - sampler| over a round's log-probs, in nats a token, past which it is refused: when its first "
        "update sees it, or when `dypo audit logprobs` did",
    )
    method: AnyMethod = DypoMethod()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _method_fits(self) -> "Train":
        if isinstance(self.method, BRIDGEMethod):
            if self.lora is not None:
                raise ValueError(
                    "lora is instead of training all weights, and method 'bridge' trains them with an adapter of its own: leave lora out, "
                    "and set method.rank and method.alpha"
                )
            if self.base_weight > 0:
                raise ValueError(
                    f"base_weight = {self.base_weight}: method 'bridge' trains an adapter and what lies under it against each other, and has "
                    "a shadow of the weights; leave base_weight out"
                )
            if self.processes > 1:
                raise ValueError(
                    f"processes = {self.processes}: method 'bridge' exchanges weights with their shadow in one process; set processes = 1"
                )
        return self

    @property
    def adapter(self) -> Lora | None:
        """The adapter that is trained: `lora`, or method bridge's."""
        return Lora(rank=self.method.rank, alpha=self.method.alpha) if isinstance(self.method, BRIDGEMethod) else self.lora


# ---------------------------------------------------------------- evaluation
class Suite(Model):
    """An eval set: the eval prompts of some sources."""

    name: str = Field(pattern=NAME)
    sources: list[str] = Field(min_length=1)
    out_of_distribution: bool = False
    limit: int | None = Field(default=None, ge=1)
    n: int = Field(default=4, ge=1, description="samples a problem: avg@n")
    pass_k: list[Annotated[int, Field(ge=1)]] = [1]
    maj: bool = Field(default=False, description="maj@n too: is the commonest answer right?")
    temperature: float | None = Field(default=None, ge=0, description="default: that of [eval]")
    top_p: float | None = Field(default=None, gt=0, le=1, description="the same")
    max_tokens: int | None = Field(default=None, ge=1, description="the same")
    every_rounds: int | None = Field(default=None, ge=0, description="the same")


class Eval(Model):
    """Suites and how they are sampled. The same engine and scorers as training."""

    suites: list[Suite] = []
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=2048, ge=1)
    every_rounds: int = Field(
        default=0, ge=0, description="in `dypo run`: 0 = before and after; n = after each n rounds too"
    )


class Recipe(Model):
    """A whole run. In a file, `include = ["suites/aime24.toml"]` lays the recipe over other files' tables first (docs/evaluation.md)."""

    name: str = Field(pattern=NAME)
    run: Path
    seed: int = 0
    rounds: int = Field(default=1, ge=1)
    policy: Policy
    sources: list[Source] = Field(min_length=1)
    decontaminate: Decontaminate | None = None
    teachers: list[Teacher] = []
    rollouts: Rollouts = Rollouts()
    score: Score
    grade: Grade = Grade()
    train: Train
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "Recipe":
        method, first = self.train.method, self.train.method.routing(0)
        if (first.union or first.sft == ALL or first.discriminator is not None) and not self.teachers:
            raise ValueError(
                f"train.method: type = '{method.type}' learns from traces of every prompt, and the recipe has no [[teachers]]. Add one, "
                "or take a method that reads rollouts alone (grpo, dapo, ...)"
            )
        if isinstance(method, AfterSFT) and self.rounds <= method.rounds_before_rl:
            keys = [key for key in ("sft_rounds", "align_rounds") if hasattr(method, key)]
            counted = " and ".join(f"{key} = {getattr(method, key)}" for key in keys)
            raise ValueError(
                f"rounds = {self.rounds} leaves none for RL after train.method.{counted}: raise rounds, lower that, or take type = 'sft'"
            )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> "Recipe":
        for what, names in (
            ("sources", [s.name for s in self.sources]),
            ("teachers", [t.name for t in self.teachers]),
            ("eval.suites", [s.name for s in self.eval.suites]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what}: the name '{name}' is given twice; names are keys")
        for source in self.sources:
            if source.verifier not in self.score.verifiers:
                raise ValueError(
                    f"sources.{source.name}: verifier '{source.verifier}' is not among "
                    f"score.verifiers ({', '.join(self.score.verifiers)})"
                )
        if self.grade.hard_max_successes + self.grade.easy_max_failures >= self.rollouts.k:
            raise ValueError(
                f"grade: hard_max_successes {self.grade.hard_max_successes} + easy_max_failures "
                f"{self.grade.easy_max_failures} must be below rollouts.k = {self.rollouts.k}, or no prompt can be mid"
            )
        for suite in self.eval.suites:
            for name in suite.sources:
                if name not in {s.name for s in self.sources}:
                    raise ValueError(f"eval.suites.{suite.name}: no source is named '{name}'")
            judges = {s.verifier: self.score.verifiers[s.verifier].type for s in self.sources if s.name in suite.sources}
            for name, kind in judges.items() if suite.maj else ():
                if kind in ("user", "judge"):
                    raise ValueError(
                        f"eval.suites.{suite.name}: maj counts equal answers, and verifier '{name}' (type '{kind}') extracts none. "
                        "Leave maj out, or name a verifier of type math, exact, choice or reasoning_gym"
                    )
            if max(suite.pass_k, default=1) > suite.n:
                raise ValueError(f"eval.suites.{suite.name}: pass@{max(suite.pass_k)} needs n >= that, found n = {suite.n}")
        return self


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A Recipe from a TOML tree. UserError names the file, the key, what was expected and the nearest known key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise UserError(f"{where}: the recipe is not valid\n" + "\n".join(explained(e, Recipe))) from None


def explained(e: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for each error of a tree that should have been a `root`: the key, what was expected, what was found."""
    lines = []
    for err in e.errors():
        key = _shown(err["loc"], root)
        if err["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(err["loc"][-1]), _known_keys(err["loc"][:-1], root), n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            known = ", ".join(_known_keys(err["loc"][:-1], root))
            lines.append(f"  {key}: unknown key{hint or '.'} Known here: {known}")
        elif err["type"] == "union_tag_invalid":
            said = err.get("ctx", {})
            tag, tags = str(said.get("tag")), str(said.get("expected_tags")).replace("'", "")
            near = difflib.get_close_matches(tag, tags.split(", "), n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"  {key}.type: '{tag}' is not known{hint or '.'} Known here: {tags}")
        elif err["type"] == "union_tag_not_found":
            lines.append(f"  {key}: needs a `type` ({_tags(err['loc'], root)})")
        else:
            found = "" if err["type"] in ("missing", "value_error") else f" (found {err['input']!r})"
            lines.append(f"  {key or root.__name__.lower()}: {err['msg'].removeprefix('Value error, ')}{found}")
    return lines


def _shown(loc: tuple[int | str, ...], root: Any) -> str:
    """A pydantic error location as the user wrote it: without the tags of unions."""
    kind = root
    parts = []
    for part in loc:
        is_tag = not (_is_model(kind) and part in kind.model_fields) and any(_tag(m) == part for m in _members(kind))
        if not is_tag:
            parts.append(str(part))
        kind = _step(kind, part)
    return ".".join(parts)


def _known_keys(loc: tuple[int | str, ...], root: Any) -> list[str]:
    """The keys of the table at a pydantic error location (which names union members by their tag)."""
    kind = root
    for part in loc:
        kind = _step(kind, part)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _tags(loc: tuple[int | str, ...], root: Any) -> str:
    """The values of `type` that the union at a pydantic error location knows."""
    kind = root
    for part in loc[:-1]:
        kind = _step(kind, part)
    field = kind.model_fields.get(str(loc[-1])) if _is_model(kind) else None
    return " | ".join(_tag(m) or "" for m in _members(field.annotation if field else kind))


def _members(kind: Any) -> list[type[BaseModel]]:
    """The models inside an annotation."""
    return [kind] if _is_model(kind) else [m for a in get_args(kind) for m in _members(a)]


def _step(kind: Any, part: int | str) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if part in kind.model_fields:
            return kind.model_fields[str(part)].annotation
        return kind
    members = _members(kind)
    tagged = [m for m in members if _tag(m) == part]
    if tagged:
        return tagged[0]
    return members[0] if len(members) == 1 else kind


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(kind: type[BaseModel]) -> str | None:
    field = kind.model_fields.get("type")
    return get_args(field.annotation)[0] if field else None
