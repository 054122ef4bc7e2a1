"""`make bench-skips`: what sequential groups and reuse save in tokens, and how many prompts they route otherwise.

    python -m tests.bench.skips [--run RUN] [--json]          RUN: whole groups of 16 of every prompt in each round; made if it is not there

One idea: replay. The run holds what drawing everything gives; each setting is told only the draws that it would have made, through the
same functions and the same query as `dypo generate`, and its grade of each prompt is compared with the whole group's of the same
round. To read the error: two whole groups of the same policy differ too, by chance alone, and that is printed beside it.
Tokens are response tokens, of all rounds. Left out: that the trained policy would have been another one.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.skips import stopping
from pipeline.store import ask, connect, sql
from schemas.recipe import Reuse, Sequential
from schemas.tables import ARROW, TABLES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: list[tuple[int, Sequential | None, Reuse | None]] = [
    *((k, Sequential(block=b, confidence=c), None) for k in (8, 16) for b, c in ((4, 0.8), (4, 0.85), (4, 0.9), (2, 0.85))),
    *((k, None, Reuse(max_age=age)) for k in (8, 16) for age in (1, 2, 3)),
    *((k, Sequential(block=4, confidence=0.85), Reuse(max_age=2)) for k in (8, 16)),
]

Groups = dict[int, dict[str, list[tuple[bool, int]]]]  # round -> prompt -> (correct, tokens) of each sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "whole16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not (args.run / "report.html").exists():
        settings = (f"run={args.run}", "rollouts.k=16", "rollouts.prompts_per_round=1024", "eval.suites=[]")
        options = [word for setting in settings for word in ("--set", setting)]
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(ROOT / "recipes" / "tiny.toml"), *options], check=True)
    groups = read(args.run)
    found = [replay(groups, k, sequential, reuse) for k, sequential, reuse in SETTINGS]
    noise = by_chance(groups)
    if args.json:
        print(json.dumps({"settings": found, "two_groups_of_8_differ": noise}))
        return
    for row in found:
        print(f"k {row['k']}, {row['setting']}: {row['saved']:.1%} fewer tokens, {row['changed']:.2%} of routes changed")
    print(f"two whole groups of 8 of one policy are routed differently: {noise:.1%} of prompts")


def read(run: Path) -> Groups:
    rows = ask(
        connect(run),
        "select r.round, r.prompt_id, s.correct, r.length from rollouts r join scores s on s.kind = 'rollout' and s.id = r.rollout_id "
        "order by r.round, r.prompt_id, r.sample",
    ).to_pylist()
    groups: Groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["round"]][row["prompt_id"]].append((row["correct"], row["length"]))
    return groups


def grade(samples: list[tuple[bool, int]]) -> str:
    right = sum(correct for correct, _ in samples)
    return "hard" if right == 0 else "easy" if right == len(samples) else "mid"


def by_chance(groups: Groups) -> float:
    differ = [grade(samples[:8]) != grade(samples[8:]) for each in groups.values() for samples in each.values()]
    return sum(differ) / len(differ)


def replay(groups: Groups, k: int, sequential: Sequential | None, reuse: Reuse | None) -> dict[str, Any]:
    """Goes through the rounds, drawing what the setting draws."""
    drawn: Groups = defaultdict(dict)
    history: list[dict[str, Any]] = []  # rows of grades
    newest: dict[str, str] = {}
    tokens = whole = changed = prompts = 0
    for round, each in sorted(groups.items()):
        reused = _reused(round, list(each), history, drawn, k, reuse) if reuse and round else set()
        left = [prompt for prompt in each if prompt not in reused]
        drawn[round] = {p: each[p][: min(sequential.block, k) if sequential else k] for p in left}
        stops: dict[str, tuple[str, float]] = {}
        while sequential:
            stops = stopping(_standing(round, drawn, k, sequential), k, sequential, 0, 0)
            more = [p for p in left if p not in stops and len(drawn[round][p]) < k]
            for p in more:
                drawn[round][p] = each[p][: min(k, len(drawn[round][p]) + sequential.block)]
            if not more:
                break
        for p in left:
            newest[p] = stops[p][0] if p in stops else grade(drawn[round][p])
            blank = {"round": round, "source_round": round, "policy": "", "k": k, "successes": 0, "unjudged": 0, "traces": 0}
            history.append({**blank, "prompt_id": p, "grade": newest[p], "reason": newest[p]})
        whole += sum(n for samples in each.values() for _, n in samples[:k])
        tokens += sum(n for samples in drawn[round].values() for _, n in samples)
        changed += sum(newest[p] != grade(samples[:k]) for p, samples in each.items())
        prompts += len(each)
    told = ", ".join(f"{type(s).__name__.lower()} {s.model_dump(exclude_none=True)}" for s in (sequential, reuse) if s)
    return {"k": k, "setting": told, "saved": 1 - tokens / whole, "changed": changed / prompts}


def _standing(round: int, drawn: Groups, k: int, sequential: Sequential) -> dict[str, dict[str, Any]]:
    """What sequential.sql counts, in Python."""
    found = {}
    for p, samples in drawn[round].items():
        past = [(sequential.memory ** (round - r), drawn[r][p]) for r in range(round) if p in drawn[r]]
        found[p] = {
            "draws": len(samples),
            "successes": sum(c for c, _ in samples),
            "first_draws": len(samples[: sequential.block]),
            "first_successes": sum(c for c, _ in samples[: sequential.block]),
            "past_successes": sum(weight * sum(c for c, _ in old) for weight, old in past),
            "past_failures": sum(weight * sum(not c for c, _ in old) for weight, old in past),
        }
    return found


def _reused(round: int, prompts: list[str], history: list[dict[str, Any]], drawn: Groups, k: int, reuse: Reuse) -> set[str]:
    """What reuse.sql answers over the grades so far."""
    con = duckdb.connect()
    lengths = [
        {"prompt_id": p, "round": r, "policy": "", "length": n}
        for r, each in drawn.items()
        for p, samples in each.items()
        for _, n in samples
    ]
    con.register("grades", pa.Table.from_pylist(history, schema=TABLES["grades"].arrow()))
    con.register("rollouts", pa.Table.from_pylist(lengths))
    con.register("skips", ARROW["skips"].empty_table())
    con.register("round_prompts", pa.table({"prompt_id": prompts}))
    rows = ask(con, sql("reuse"), round=round, k=k, max_age=reuse.max_age, token_budget=reuse.token_budget)
    return set(rows["prompt_id"].to_pylist())


if __name__ == "__main__":
    main()
