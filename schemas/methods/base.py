"""What a method says of itself, in the three terms that the rest of the project understands.

    routing(round)   which grades' prompts become rows, of which kind          sql/route.sql reads it
    loss             what is computed of the rows of a step                    trainer/objective.py reads it
    weights(step)    how its components are mixed: L = sft SFT + grpo PG + gal GAL

One idea: a method is these three answers and its published defaults, nothing else. So each is a small file here with its source,
and every rival runs through the same rows, the same denominators and the same loop. Left out: any arithmetic.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.methods.terms import GAL, GRPO, Discriminator
from schemas.model import Model, merge

Grade = Literal["easy", "mid", "hard"]
Role = Literal["old", "ref", "teacher"]
Adjustment = Literal["contrast", "leave_one_out", "posterior", "teacher_by_coverage"]
ALL: tuple[Grade, ...] = ("easy", "mid", "hard")


@dataclass(frozen=True)
class Routing:
    """Which prompts' rows are trained on. rl: grades whose groups are. sft: grades whose verified traces are supervised.

    union: beside its group each prompt has its trace as an off-policy member: advantages are over both, and the trace has
    a policy gradient of its own. Without rl the round needs no rollouts, and sft takes every prompt that has a trace.
    pass_rate: of the groups, those with successes / k from the first to the second, ends included.
    discriminator: a rollout's reward is its score by one that is fitted so (table ratings), and only prompts with a trace have groups.
    """

    rl: tuple[Grade, ...] = ()
    sft: tuple[Grade, ...] = ()
    union: bool = False
    pass_rate: tuple[float, float] = (0.0, 1.0)
    discriminator: Discriminator | None = None


@dataclass(frozen=True)
class Weights:
    """Of the components in the mixture: L = sft SFT + grpo PG + gal GAL."""

    sft: float = 0.0
    grpo: float = 0.0
    gal: float = 0.0


@dataclass(frozen=True)
class Loss:
    """What is computed of a step's rows. docs/losses.md has the formula of each value.

    trace_weight: of a supervised token (phi: CHORD, entropy: SRFT). rollout_term: of a rollout's token (self: SRFT's own,
    distill: the teacher's log-prob minus the sampler's as the advantage of each token). off_policy: of the token of a trace
    that is a member of a group (shaped: LUFFY, ratio: SRFT). normalise: gated: each component counts by its share of
    the step's prompts; all: Easy prompts that were dropped count too; own: each is a mean over its own rows.
    """

    grpo: GRPO = field(default_factory=GRPO)
    gal: GAL | None = None
    trace_weight: Literal["plain", "phi", "entropy"] = "plain"
    rollout_term: Literal["surrogate", "self", "distill"] = "surrogate"
    off_policy: Literal["none", "shaped", "ratio"] = "none"
    shaping: float = 0.1
    sft_reduction: Literal["token", "prompt"] = "token"
    normalise: Literal["gated", "all", "own"] = "gated"

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the base policy's log-probs, so that rows of role ref are needed."""
        return (self.gal is not None and self.gal.form == "pairs" and self.gal.ref == "init") or self.grpo.kl > 0

    @property
    def logprob_roles(self) -> tuple[Role, ...]:
        """The roles of stored log-probs that it reads."""
        wanted = {"old": self.grpo.old == "trainer", "ref": self.needs_reference, "teacher": self.rollout_term == "distill"}
        roles: tuple[Role, ...] = ("old", "ref", "teacher")
        return tuple(role for role in roles if wanted[role])


@dataclass(frozen=True)
class Queues:
    """Two queues, two optimizers: an SFT update takes `sft` traces, an RL update at least `groups` groups (schedule.py).

    flush: the last step of a round takes the traces that still wait, however few.
    """

    sft: int
    groups: int
    flush: bool = False


@dataclass(frozen=True)
class Stage:
    """Rounds that belong together: the learning rate's warm-up and decay go over them, by one optimizer. decay None: the recipe's."""

    first: int
    rounds: int
    optimizer: Literal["main", "sft"] = "main"
    decay: Literal["constant", "linear", "cosine"] | None = None
    warmup: float | None = None  # share of the stage's steps


class Method(Model, ABC):
    """What all methods have. A subclass names its `type`, its published defaults and its source."""

    PUBLISHED: ClassVar[dict[str, Any]] = {}  # defaults of tables, on which the recipe's keys are laid

    lr: float = Field(default=1e-6, gt=0)
    query: Path | None = Field(
        default=None, description="a routing .sql file of yours with the columns of shards but the lists"
    )
    adjust: tuple[Adjustment | Path, ...] = Field(
        default=(), description="queries over the routed rows, one after the other (docs/adjust.md); or .sql files of yours"
    )

    @model_validator(mode="before")
    @classmethod
    def _on_what_was_published(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        published = dict(cls.published(values))
        given = values.get("grpo")
        if isinstance(given, dict) and "grpo" in published:  # TOML cannot take a key away, so another choice does
            other = {
                key for key in ("aggregation", "surrogate") if key in given and given[key] != published["grpo"].get(key)
            }
            gone = {"horizon"} if "aggregation" in other else set()
            gone |= {"clip_low", "clip_high"} if "surrogate" in other else set()
            published["grpo"] = {key: value for key, value in published["grpo"].items() if key not in gone}
        return merge(published, values)

    @classmethod
    def published(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The defaults that the given values are laid on."""
        return cls.PUBLISHED

    @model_validator(mode="after")
    def _adjustments_fit(self) -> "Method":
        union = any(self.routing(n).union for n in range(self.rounds_before_rl + 1))
        if union and "leave_one_out" in self.adjust:
            raise ValueError(
                "adjust: leave_one_out takes groups of rollouts alone, and this method's have the trace as a member"
            )
        return self

    @property
    def rounds_before_rl(self) -> int:
        """How many rounds there are before the first of its last stage."""
        return 0

    @abstractmethod
    def routing(self, round: int) -> Routing:
        """Which grades' prompts are trained on in a round, and how."""

    @abstractmethod
    def weights(self, step: int) -> Weights:
        """The mixture at a step, counted over the whole run from 0."""

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """What is computed of a step's rows."""

    @property
    def queues(self) -> Queues | None:
        """None: one update a step, on all that it drew."""
        return None

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each optimizer that it has: main, sft."""
        return {"main": self.lr}

    def unused(self, round: int) -> frozenset[str]:
        """Its keys that a round's training does not read, so that changing one does not make that round another."""
        return frozenset({"query", "adjust"})

    def stage(self, round: int, rounds: int) -> Stage:
        """The stage that a round of a run of so many belongs to: the whole run, if a method has one."""
        return Stage(0, rounds)


class GroupMethod(Method):
    """A policy gradient on every whole group of rollouts and nothing else: GRPO and its family."""

    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL)

    def weights(self, step: int) -> Weights:
        return Weights(grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)
