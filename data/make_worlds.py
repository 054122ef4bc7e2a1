"""Makes the two worlds of the study: problems and three base policies each, under data/worlds.

    python data/make_worlds.py                           everything (about two minutes a policy, on one core)
    python data/make_worlds.py --problems                the problem files alone (a moment)
    python data/make_worlds.py --world skill --seed 2    one policy
    python data/make_worlds.py --teacher                 the policy that knows the skill, for on-policy distillation
    python data/make_worlds.py --out DIR                 under DIR, to compare with what is committed

What each world is for: docs/results/study-worlds.md. One idea: a world is what its teachers, its problems and its pretraining
say, and nothing but the seed differs between two of its bases. Steps and weights were chosen by measuring, so that of the train
problems at least one in eight is easy, one in eight mid and one in eight hard for each base, and fixed before any study ran.
"""

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from pipeline import tiny

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "worlds")]

import make_tiny_policy as maker  # noqa: E402
import teachers  # noqa: E402

SEEDS = (0, 1, 2)
TERMS = {2: 2.5, 3: 1.5, 4: 1.5, 5: 1.5, 6: 1.5, 7: 1.5}  # the train mix, by number of terms
SKILL = 0.3  # share of the skill world's problems that have the new sign
SIGNS = 0.25  # share of its pretraining that has either sign, each as often


# --- problems --------------------------------------------------------------------------------------------------------


def plain(rng: random.Random) -> str:
    return tiny.sum_problem(rng, TERMS)


def signed(rng: random.Random, sign: str) -> str:
    """One to three terms, one of them (20 to 99) with a sign."""
    values = [rng.randint(1, 99) for _ in range(rng.choice((0, 1, 1, 2)))]
    at = rng.randint(0, len(values))
    spelt = [tiny.write(value) for value in values]
    return "+".join([*spelt[:at], tiny.write(rng.randint(20, 99)) + sign, *spelt[at:]])


def mixed(rng: random.Random) -> str:
    return signed(rng, teachers.NEW) if rng.random() < SKILL else plain(rng)


def with_signs(rng: random.Random, weights: Mapping[int, float]) -> str:
    """Pretraining of `skill`."""
    if rng.random() < SIGNS:
        return signed(rng, rng.choice((teachers.OLD, teachers.NEW)))
    return tiny.sum_problem(rng, weights)


def with_subtractions(rng: random.Random, weights: Mapping[int, float]) -> str:
    """Pretraining of `styles`: one in ten is a subtraction, which post-training does not rehearse."""
    return tiny.subtraction_problem(rng) if rng.random() < 0.1 else tiny.sum_problem(rng, weights)


# --- worlds ----------------------------------------------------------------------------------------------------------

PRETRAINING = {
    "gold": teachers.gold,
    "short": {2: 2.0, 3: 3.5, 4: 3.0, 5: 1.5},
    "mixed": {2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 1.2, 7: 0.8},
    "copy_steps": 400,
    "heads": 4,
    "rope_theta": 100.0,
}
WORLDS = {
    "styles": maker.World(
        files={
            "train": (plain, 1024),
            "validation": (plain, 200),
            "eval_id": (plain, 1000),
            "eval_shift": (tiny.shift_problem, 1000),
            "eval_sub": (tiny.subtraction_problem, 1000),
        },
        teachers=teachers.TEACHERS,
        problem=with_subtractions,
        styles={"first": 1.0, "marked": 1.0, "last": 2.0},
        short_steps=1300,
        steps=2200,
        rates=[(0, 1e-4), (50, 5e-3), (1300, 3e-3), (1800, 2e-3), (2200, 7e-4)],
        **PRETRAINING,
    ),
    "skill": maker.World(
        files={
            "train": (mixed, 1024),
            "validation": (mixed, 200),
            "eval_id": (mixed, 1000),
            "eval_shift": (tiny.shift_problem, 1000),
            "eval_skill": (partial(signed, sign=teachers.NEW), 1000),
            "eval_old": (partial(signed, sign=teachers.OLD), 1000),
        },
        teachers={name: partial(teachers.TEACHERS[name], times=teachers.BEFORE) for name in ("first", "equals")},
        problem=with_signs,
        styles={"first": 1.0, "equals": 1.0},
        short_steps=1200,
        steps=1800,
        rates=[(0, 1e-4), (50, 5e-3), (1200, 3e-3), (1500, 2e-3), (1800, 7e-4)],
        **PRETRAINING,
    ),
}

EXPERT = replace(  # longer, and both signs stand for three times
    WORLDS["skill"],
    teachers={name: teachers.TEACHERS[name] for name in ("first", "equals")},
    short_steps=1400,
    steps=3000,
    rates=[(0, 1e-4), (50, 5e-3), (1400, 3e-3), (2200, 2e-3), (2700, 1e-3), (3000, 1e-4)],
)


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit(model: LlamaForCausalLM, world: maker.World, style: str, problems: list[str]) -> tuple[float, float]:
    """(nats a token of a teacher's traces, the share of them in the choice of the style): mean over all response tokens."""
    total, opening, tokens = 0.0, 0.0, 0
    for problem in problems:
        prompt = maker.encode(tiny.BOS + problem + "=")
        response = maker.encode(world.teachers[style](problem, random.Random(0)) + tiny.EOS)
        logps_1TV = model(input_ids=torch.tensor([prompt + response[:-1]])).logits.log_softmax(-1)
        logps = logps_1TV[0, len(prompt) - 1 :].gather(-1, torch.tensor(response)[:, None])[:, 0]
        total, opening, tokens = total - float(logps.sum()), opening - float(logps[0]), tokens + len(response)
    return total / tokens, opening / tokens


def measure(model: LlamaForCausalLM, world: maker.World, problems: dict[str, list[str]]) -> dict[str, str]:
    """What PROVENANCE.md states about one policy."""
    found: dict[str, str] = {}
    counts = maker.successes(world, model, problems["train"], k=8, temperature=1.0, seed=2)
    easy, hard = (sum(c == target for c in counts.values()) / len(counts) for target in (8, 0))
    found["train, k = 8 at T = 1: easy / mid / hard, %"] = (
        f"{100 * easy:.1f} / {100 * (1 - easy - hard):.1f} / {100 * hard:.1f}"
    )
    for n in TERMS:
        of_n = [c for problem, c in counts.items() if problem.count("+") == n - 1 and teachers.NEW not in problem]
        found[f"train, {n} terms: right at T = 1, %"] = f"{100 * sum(of_n) / (8 * len(of_n)):.1f}"
    for file in world.files:
        if file.startswith("eval"):
            counts = maker.successes(world, model, problems[file], k=2, temperature=0.6, seed=1)
            found[f"{file}, avg@2 at T = 0.6, %"] = f"{100 * sum(counts.values()) / (2 * len(counts)):.1f}"
    known = [problem for problem in problems["train"] if teachers.NEW not in problem][:400]
    for style in world.styles:
        nats, opening = fit(model, world, style, known)
        found[f"`{style}`: nats a token of its traces (of which the choice of style)"] = f"{nats:.4f} ({opening:.4f})"
    if "eval_skill" in world.files:
        asked = [problem for problem in problems["train"] if teachers.NEW in problem]
        counts = maker.successes(world, model, asked, k=64, temperature=1.0, seed=3)
        solved = sum(c > 0 for c in counts.values())
        found["train problems with the skill, 64 samples at T = 1: solved at least once"] = f"{solved} of {len(asked)}"
    return found


def provenance(command: str, title: str, world: maker.World, seed: int, sha256: str, found: dict[str, str]) -> str:
    rows = "\n".join(f"| {what} | {value} |" for what, value in found.items())
    styles = ", ".join(f"{style} {weight:g}" for style, weight in world.styles.items())
    return f"""# {title}

Written by `python data/make_worlds.py {command}`, which makes it again; do not edit. The recipe is that file's
constants; docs/results/study-worlds.md says what the world is for.

- What: a Llama of 108,032 parameters in fp32 (2 layers, width 64, {world.heads} heads), one token a character, pretrained from nothing on
  generated sums; no data from elsewhere. The problems of the world's files are never in it.
- Recipe: {world.steps} steps of {maker.BATCH} texts, seed {seed}, one thread, torch {torch.__version__.split("+")[0]}; styles by weight: {styles}.
- sha256 of model.safetensors: `{sha256}`
  (the same on a rerun with the same torch build and kind of processor; others may round differently)

| measured on it | |
|---|---|
{rows}
"""


def make_policy(policy: Path, command: str, title: str, world: maker.World, seed: int) -> list[float]:
    """One policy with its provenance; its easy, mid and hard shares of the train problems in per cent."""
    problems = maker.make_problems(world)
    model = maker.pretrain(world, {problem for rows in problems.values() for problem in rows}, seed)
    sha256 = maker.save(model, policy)
    found = measure(model, world, problems)
    (policy / "PROVENANCE.md").write_text(provenance(command, title, world, seed, sha256, found))
    print(f"{policy}  sha256 {sha256}")
    for what, value in found.items():
        print(f"{what}: {value}")
    return [float(share) for share in next(iter(found.values())).split(" / ")]


def main() -> int:
    parser = argparse.ArgumentParser(description="make the study's worlds: problems and base policies")
    parser.add_argument("--world", choices=WORLDS, action="append", help="default: both")
    parser.add_argument("--seed", type=int, action="append", help=f"default: {SEEDS}")
    parser.add_argument("--teacher", action="store_true", help="the policy that knows the skill")
    parser.add_argument("--problems", action="store_true", help="write the problem files only")
    parser.add_argument("--out", type=Path, default=HERE / "worlds", help="folder to write into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.teacher:
        make_policy(
            args.out / "skill" / "teacher", "--teacher", "World skill, a policy that knows the skill", EXPERT, seed=10
        )
        return 0
    good = True
    for name in args.world or WORLDS:
        world = WORLDS[name]
        maker.write_problems(world, maker.make_problems(world), args.out / name)
        for seed in () if args.problems else args.seed or SEEDS:
            command, title = f"--world {name} --seed {seed}", f"World {name}, base policy {seed}"
            mix = make_policy(args.out / name / f"base-{seed}", command, title, world, seed)
            if min(mix) < 12:
                print(f"{name}, base {seed}: easy / mid / hard is {mix}; the study wants 12 % of each", file=sys.stderr)
                good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
