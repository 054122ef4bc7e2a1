"""Makes the committed data of the tiny world: the problems in data/tiny and the base policy in data/tiny_policy.

    python data/make_tiny_policy.py                  problems, policy and its PROVENANCE.md (some minutes on one core)
    python data/make_tiny_policy.py --problems       the problem files alone (a moment)
    python data/make_tiny_policy.py --out DIR        everything under DIR, to compare with what is committed

One idea: the base should be a policy worth post-training. It learns all four teachers' styles on sums of two to seven terms,
short ones first, and stops while long sums are still mostly beyond it, so that easy, mid and hard prompts all occur. Fixed
steps, fixed seeds, one thread: the same machine and torch give the same bytes. The problems are kept out of pretraining.

A `World` is what such a policy is pretrained on; TINY is the demo's, make_worlds.py has those of the study.

It leaves out post-training, and any search for a better recipe: learning has a sharp transition (copying an operand), longer
sums from the start never reached it in this budget, and other seeds are untried, so a run that misses it fails by name.
"""

import argparse
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline import tiny

HERE = Path(__file__).resolve().parent

Teacher = Callable[[str, random.Random], str]
Rates = Sequence[tuple[int, float]]

BATCH = 64
BLOCK = 16 * BATCH  # texts that are sorted by length before they are cut into batches

MAX_NEW = 80
FLOOR = 35.0  # avg@4 of TINY on eval_id below this: the transition was missed

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}="
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class World:
    """Problems in files, and what a base policy is pretrained on."""

    files: Mapping[str, tuple[Callable[[random.Random], str], int]]  # file: whose problems, how many
    gold: Callable[[str], str]
    problem: Callable[[random.Random, Mapping[int, float]], str]  # of pretraining, terms by these weights
    teachers: Mapping[str, Teacher]
    styles: Mapping[str, float]  # teachers by their weight in pretraining
    short: Mapping[int, float]  # terms of the first `short_steps`
    mixed: Mapping[int, float]  # and after them
    short_steps: int
    steps: int
    rates: Rates  # the learning rate at some steps, linear between
    copy_steps: int = (
        0  # the first steps, in which a response is its first character and the problem: copying is learnt first
    )
    heads: int = 2
    rope_theta: float = 10_000.0
    problem_seed: int = 1234

    def is_right(self, problem: str, text: str) -> bool:
        """The verdict on a finished response without its EOS."""
        return tiny.answer(text) == self.gold(problem)


def _tiny_problem(rng: random.Random, weights: Mapping[int, float]) -> str:
    """One in ten is a subtraction, which post-training will not rehearse."""
    return tiny.subtraction_problem(rng) if rng.random() < 0.1 else tiny.sum_problem(rng, weights)


TINY = World(
    files={
        "train": (tiny.PROBLEMS["id"], 1024),
        "eval_id": (tiny.PROBLEMS["id"], 256),
        "eval_sub": (tiny.PROBLEMS["sub"], 128),
        "eval_shift": (tiny.PROBLEMS["shift"], 128),
    },
    gold=tiny.gold,
    problem=_tiny_problem,
    teachers={**tiny.TEACHERS, "noisy": partial(tiny.noisy, slip=0)},
    styles={"left": 1.0, "right": 1.0, "rewrite": 1.0, "noisy": 0.6},
    short={2: 5.0, 3: 4.0, 4: 1.5, 5: 0.5},
    mixed={2: 3.0, 3: 2.5, 4: 2.0, 5: 1.5, 6: 1.0, 7: 1.0},
    short_steps=2000,
    steps=4400,
    rates=[(0, 1e-4), (50, 5e-3), (2000, 3e-3), (2600, 2e-3), (3200, 2e-3), (3800, 1e-3), (4400, 1e-4)],
)


# --- problems --------------------------------------------------------------------------------------------------------


def make_problems(world: World) -> dict[str, list[str]]:
    """Every file's problems, drawn in order from one generator, none of them twice."""
    rng, taken = random.Random(world.problem_seed), set[str]()
    return {name: tiny.distinct(make, count, rng, taken) for name, (make, count) in world.files.items()}


def write_problems(world: World, problems: dict[str, list[str]], folder: Path) -> None:
    """One JSONL file each; rows of `prompt` and `answer`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in problems.items():
        lines = [json.dumps({"prompt": problem, "answer": world.gold(problem)}) for problem in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. There is no unknown token on purpose: a foreign character is an error, not a guess."""
    core = Tokenizer(models.WordLevel({char: i for i, char in enumerate(tiny.ALPHABET)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=tiny.PAD,
        bos_token=tiny.BOS,
        eos_token=tiny.EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def encode(text: str) -> list[int]:
    return [tiny.ALPHABET.index(char) for char in text]


def decode(tokens: list[int]) -> str:
    return "".join(tiny.ALPHABET[token] for token in tokens)


# --- pretraining -----------------------------------------------------------------------------------------------------


def make_model(world: World, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny.ALPHABET),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=world.heads,
        num_key_value_heads=world.heads,
        rope_theta=world.rope_theta,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=encode(tiny.PAD)[0],
        bos_token_id=encode(tiny.BOS)[0],
        eos_token_id=encode(tiny.EOS)[0],
    )
    return LlamaForCausalLM(config).float()


def batches(world: World, held_out: set[str], seed: int) -> Iterator[list[tuple[int, list[int]]]]:
    """One batch a step: (prompt length, tokens) of texts of about the same length."""
    rng = random.Random(seed)
    for block in range(world.steps * BATCH // BLOCK + 1):
        weights = world.short if block * BLOCK < world.short_steps * BATCH else world.mixed
        texts: list[tuple[int, list[int]]] = []
        while len(texts) < BLOCK:
            problem = world.problem(rng, weights)
            if problem in held_out:
                continue
            (style,) = rng.choices(list(world.styles), list(world.styles.values()))
            response = world.teachers[style](problem, rng)
            if block * BLOCK < world.copy_steps * BATCH:
                response = response[0] + problem
            prompt = tiny.BOS + problem + "="
            texts.append((len(prompt), encode(prompt + response + tiny.EOS)))
        texts.sort(key=lambda item: len(item[1]))
        cut = [texts[i : i + BATCH] for i in range(0, BLOCK, BATCH)]
        rng.shuffle(cut)
        yield from cut


def rate(rates: Rates, step: int) -> float:
    """The learning rate: linear between the points."""
    for (start, low), (end, high) in itertools.pairwise(rates):
        if step < end:
            return low + (high - low) * (step - start) / (end - start)
    return rates[-1][1]


def pretrain(world: World, held_out: set[str], seed: int) -> LlamaForCausalLM:
    """Next-token loss on responses only, mean over a batch's response tokens."""
    model = make_model(world, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step, batch in zip(range(world.steps), batches(world, held_out, seed), strict=False):
        width = max(len(tokens) for _, tokens in batch)
        tokens_BT = torch.full((BATCH, width), encode(tiny.PAD)[0])
        labels_BT = torch.full((BATCH, width), -100)
        for row, (prompt_length, tokens) in enumerate(batch):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            labels_BT[row, prompt_length : len(tokens)] = tokens_BT[row, prompt_length : len(tokens)]
        for group in optimizer.param_groups:
            group["lr"] = rate(world.rates, step)
        # Padding is on the right, so causal attention never sees it and needs no mask.
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{world.steps}  loss {loss.item():.3f}  lr {rate(world.rates, step):.1e}", flush=True)
    return model.eval()


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def successes(
    world: World, model: LlamaForCausalLM, problems: list[str], k: int, temperature: float, seed: int
) -> dict[str, int]:
    """Right answers out of k samples, by problem. Prompts of one length share a batch, so nothing is padded."""
    torch.manual_seed(seed)
    by_length: dict[int, list[str]] = {}
    for problem in problems:
        by_length.setdefault(len(problem), []).append(problem)
    counts: dict[str, int] = {}
    for same in by_length.values():
        prompts = torch.tensor([encode(tiny.BOS + problem + "=") for problem in same])
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=k,
            max_new_tokens=MAX_NEW,
        )
        for row, tokens in enumerate(out[:, prompts.shape[1] :].tolist()):
            response, eos, _ = decode(tokens).partition(tiny.EOS)
            problem = same[row // k]
            counts[problem] = counts.get(problem, 0) + (bool(eos) and world.is_right(problem, response))
    return counts


def measure(model: LlamaForCausalLM, problems: dict[str, list[str]]) -> dict[str, str]:
    """What PROVENANCE.md states about the base: accuracy per evaluation file and the grade mix of the train file."""
    found: dict[str, str] = {}
    for name in ("eval_id", "eval_sub", "eval_shift"):
        counts = successes(TINY, model, problems[name], k=4, temperature=0.6, seed=1)
        found[f"{name}, avg@4 at T = 0.6"] = f"{100 * sum(counts.values()) / (4 * len(counts)):.1f} %"
    counts = successes(TINY, model, problems["train"], k=8, temperature=1.0, seed=2)
    easy, hard = (sum(c == target for c in counts.values()) / len(counts) for target in (8, 0))
    mix = f"{100 * easy:.1f} / {100 * (1 - easy - hard):.1f} / {100 * hard:.1f} %"
    found["train, k = 8 at T = 1: easy / mid / hard"] = mix
    for n in tiny.TERM_WEIGHTS:
        of_n = [c for problem, c in counts.items() if len(tiny.terms(problem)) == n]
        found[f"train, {n} terms: right at T = 1"] = f"{100 * sum(of_n) / (8 * len(of_n)):.1f} %"
    return found


def provenance(model: LlamaForCausalLM, sha256: str, found: dict[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in found.items())
    version = torch.__version__.split("+")[0]
    styles = ", ".join(f"{style} {weight:g}" for style, weight in TINY.styles.items())
    return f"""# The tiny policy

Written by `python data/make_tiny_policy.py`, which makes it again; do not edit. The recipe is that file's constants.

- What: a Llama of {model.num_parameters():,} parameters in fp32 (2 layers, width 64), one token a character, pretrained from
  nothing on generated sums; no data from elsewhere.
- Recipe: {TINY.steps} steps of {BATCH} texts, seed 0, one thread, torch {version}; sums of 2-5 terms for {TINY.short_steps}
  steps, then of 2-7; the teachers' styles by weight: {styles} (without slips);
  10% subtractions. The problems of data/tiny are never in it.
- sha256 of model.safetensors: `{sha256}`
  (the same on a rerun with the same torch build and kind of processor; others may round differently)

| measured on it | |
|---|---|
{rows}
"""


def save(model: LlamaForCausalLM, policy: Path) -> str:
    """The policy's folder; the sha256 of its weights."""
    model.save_pretrained(policy)
    (policy / "model.safetensors").chmod(0o644)
    make_tokenizer().save_pretrained(policy)
    return hashlib.sha256((policy / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="make the tiny world's problems and base policy")
    parser.add_argument("--problems", action="store_true", help="write the problem files only")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write tiny/ and tiny_policy/ into")
    args = parser.parse_args()
    torch.set_num_threads(1)

    problems = make_problems(TINY)
    write_problems(TINY, problems, args.out / "tiny")
    if args.problems:
        return 0

    policy = args.out / "tiny_policy"
    model = pretrain(TINY, {problem for rows in problems.values() for problem in rows}, seed=0)
    sha256 = save(model, policy)
    found = measure(model, problems)
    (policy / "PROVENANCE.md").write_text(provenance(model, sha256, found))
    print(f"{policy}  sha256 {sha256}")
    for name, value in found.items():
        print(f"{name}: {value}")
    if float(found["eval_id, avg@4 at T = 0.6"].split()[0]) < FLOOR:
        print(f"the policy never learned to copy operands (below {FLOOR} %): try another SEED", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
