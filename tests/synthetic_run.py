"""A made-up run whose tables agree with one another: two rounds, every grade, status and reason, two teachers, two suites.

Nothing is sampled from a model; each row follows from the rows that it would follow from in a real run (grades from
verdicts, shards from grades, evals from eval verdicts), so a query that joins the tables meets what it will meet there.
One prompt, its rollouts and its traces are hostile: markup, script, terminal escapes.
"""

import json
import math
import random
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.statistics import eval_metrics
from schemas.ids import digest, prompt_id, row_id, text_sha
from schemas.manifest import Manifest, Part
from schemas.recipe import Recipe, parse_recipe
from schemas.tables import ARROW, REASONS, TABLES

UNJUDGED = ("timeout", "error", "gold_bad")
K, ROUNDS, STEPS, SAMPLES = 4, 2, 12, 4
POLICIES = [digest(["policy", i]) for i in range(ROUNDS + 1)]
HOSTILE = (
    '<script>alert("x")</script><img src=http://outside.invalid/a.png onerror=alert(1)> & [bold]b[/bold] \x1b[31mred\x00'
)

__all__ = ["ARROW", "REASONS", "build_tables", "connect", "empty_tables", "manifests", "recipe"]

Rows = dict[str, list[dict[str, Any]]]


def build_tables() -> dict[str, pa.Table]:
    """All eleven tables of the run, each with its schema."""
    rows: Rows = {name: [] for name in ARROW}
    rng = random.Random(7)
    train, evals = _prompts(rows)
    _traces(rows, train)
    for rnd in range(ROUNDS):
        _rollouts(rows, train, rnd, rng)
        _grades_and_shards(rows, train, rnd)
        _training(rows, rnd, rng)
    for rnd, step, policy, skill in ((0, 0, 0, 0.25), (0, STEPS, 1, 0.45), (1, STEPS, 2, 0.6)):
        _evals(rows, evals, rnd, step, POLICIES[policy], skill, rng)
    return {name: _table(name, rows[name]) for name in ARROW}


def empty_tables() -> dict[str, pa.Table]:
    """The same eleven tables as a run has them before its first stage."""
    return {name: _table(name, []) for name in ARROW}


def connect(tables: Mapping[str, pa.Table]) -> duckdb.DuckDBPyConnection:
    """A connection with one view per table, seen by its cursors too."""
    con = duckdb.connect(config={"threads": 1})
    for name, table in tables.items():
        con.register("incoming", table)
        con.execute(f"create table stored_{name} as from incoming")
        con.unregister("incoming")
        con.execute(f"create view {name} as from stored_{name}")
    if "scores" in tables:  # an older verifier called what is right in round 0 wrong
        older = "select * replace (0 as verifier_version, 'wrong' as status, false as correct) from scores"
        con.execute(
            f"create view score_versions as from scores union all {older} where kind = 'rollout' and round = 0 and correct"
        )
    return con


def recipe() -> Recipe:
    """A recipe that fits the tables."""
    return parse_recipe(
        {
            "name": "synthetic",
            "run": "runs/synthetic",
            "rounds": ROUNDS,
            "policy": {"model": "data/tiny_policy"},
            "sources": [
                {"type": "file", "name": "sums", "path": "sums.jsonl", "verifier": "sum"},
                {"type": "file", "name": "held_out", "path": "held_out.jsonl", "verifier": "sum", "split": "eval"},
                {"type": "file", "name": "longer", "path": "longer.jsonl", "verifier": "sum", "split": "eval"},
            ],
            "teachers": [
                {"name": t, "samples": n, "engine": {"type": "program", "program": f"tiny.{t}"}}
                for t, n in (("left", 2), ("columns", 1))
            ],
            "rollouts": {"k": K, "max_tokens": 48},
            "score": {"verifiers": {"sum": {"type": "exact", "extract": ">([0-9]+)$"}}},
            "train": {"steps": STEPS, "prompts_per_step": 4},
            "eval": {
                "suites": [
                    {"name": "sums", "sources": ["held_out"], "n": SAMPLES, "pass_k": [SAMPLES]},
                    {"name": "longer", "sources": ["longer"], "n": SAMPLES, "out_of_distribution": True},
                ]
            },
        },
        "synthetic",
    )


def manifests(tables: Mapping[str, pa.Table]) -> list[Manifest]:
    """One manifest per table that has rows, with made-up fingerprints."""
    stages = {"prompts": "ingest", "traces": "generate teachers", "rollouts": "generate rollouts", "scores": "score"}
    return [
        Manifest(
            table=name,
            keys={"round": 0} if "round" in TABLES[name].partitions else {},
            stage=stages.get(name, "grade" if name in ("grades", "shards") else "train"),
            fingerprint=digest(["fingerprint", name]),
            config={},
            parents={},
            parts=[Part(name="part-0.parquet", rows=t.num_rows, bytes=4096, sha256=digest(name))],
            rows=t.num_rows,
            rows_digest=digest(["rows", name]),
            seed=0,
            code="0.1.0+abc1234",
            created="2026-11-01T10:00:00+00:00",
        )
        for name, t in tables.items()
        if t.num_rows
    ]


# ---------------------------------------------------------------- how the rows are made
def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    table = TABLES[name].counted(pa.Table.from_pylist(rows, schema=ARROW[name]))
    for field, column in zip(table.schema, table.columns, strict=True):
        assert field.nullable or column.null_count == 0, f"{name}.{field.name} may not be null"
    return table


def _problem(i: int, terms: int) -> tuple[str, str]:
    numbers = [(i * 37 + j * 23) % 90 + 3 for j in range(terms)]
    return "+".join(map(str, numbers)), str(sum(numbers))


def _prompts(rows: Rows) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    for source, split, count, first, terms in (
        ("sums", "train", 30, 0, 2),
        ("held_out", "eval", 16, 100, 3),
        ("longer", "eval", 10, 200, 6),
    ):
        for i in range(first, first + count):
            text, answer = _problem(i, terms + i % 4)
            if i == 0:
                text = HOSTILE
            messages = [{"role": "user", "content": text}]
            rows["prompts"].append(
                {
                    "prompt_id": prompt_id(messages),
                    "messages": messages,
                    "answer": answer,
                    "verifier": "sum",
                    "source": source,
                    "split": split,
                    "metadata": json.dumps({"index": i}) if i % 2 else None,
                }
            )
    return [p for p in rows["prompts"] if p["split"] == "train"], [p for p in rows["prompts"] if p["split"] == "eval"]


def _ids(text: str, stopped: bool) -> list[int]:
    return [3 + ord(c) % 250 for c in text] + ([2] if stopped else [])


def _score(rows: Rows, kind: str, row: dict[str, Any], key: str, status: str, extracted: str | None) -> None:
    details = {
        "timeout": "killed after 10 s",
        "error": "MemoryError in verifier",
        "truncated": "finish_reason is length",
        "unparseable": "no answer found",
        "gold_bad": "the gold answer does not parse",
    }
    rows["scores"].append(
        {
            "kind": kind,
            "id": row[key],
            "prompt_id": row["prompt_id"],
            "round": row.get("round"),
            "step": row.get("step") if kind == "eval" else None,
            "suite": row.get("suite") if kind == "eval" else None,
            "teacher": row.get("teacher"),
            "text_sha": text_sha(row["text"]),
            "status": status,
            "reward": float(status == "ok"),
            "correct": status == "ok",
            "extracted": extracted,
            "verifier": "sum",
            "verifier_version": 1,
            "elapsed_ms": 10_000.0 if status == "timeout" else 0.4,
            "detail": details.get(status),
        }
    )


def _traces(rows: Rows, train: list[dict[str, Any]]) -> None:
    """`left` solves prompts 0..21, `columns` 12..26: each covers some alone, and 27.. nobody."""
    for i, p in enumerate(train):
        for teacher, count, solves in (("left", 2, i <= 21), ("columns", 1, 12 <= i <= 26)):
            for s in range(count):
                said = p["answer"] if solves and not (teacher == "left" and s == 1 and i % 5 == 0) else "1"
                text = f"{teacher}: {p['messages'][0]['content']}{' step' * (3 if teacher == 'left' else 7)}>{said}"
                row = {
                    "trace_id": row_id(p["prompt_id"], teacher, s),
                    "prompt_id": p["prompt_id"],
                    "teacher": teacher,
                    "sample": s,
                    "text": text,
                    "finish_reason": "stop",
                    "model": f"program tiny.{teacher}",
                    "sampling": json.dumps({"temperature": 0.7, "seed": s}),
                }
                rows["traces"].append(row)
                _score(rows, "trace", row, "trace_id", "ok" if said == p["answer"] else "wrong", said)


def _statuses(i: int, rnd: int) -> list[str]:
    """The verdicts of train prompt i's group; round 1 finds more right."""
    if i == 9:
        return ["ok", "timeout", "wrong", "error"]
    if i == 10:
        return ["gold_bad"] * K
    if i == 11:
        return ["ok", "wrong", "ok"]  # a group that lost a rollout
    right = max(0, min(K, (K + 1 if i < 8 else 2 if i < 19 else 0) - (i % 3 == 0) + rnd * (i % 2)))
    bad = ("wrong", "truncated", "unparseable", "wrong")
    return ["ok"] * right + [bad[(i + s) % 4] for s in range(K - right)]


def _policy_row(p: dict[str, Any], rnd: int, s: int, policy: str, text: str, stopped: bool, t: float) -> dict[str, Any]:
    tokens = _ids(text, stopped)
    return {
        "rollout_id": row_id(p["prompt_id"], policy, s, t),
        "prompt_id": p["prompt_id"],
        "round": rnd,
        "sample": s,
        "policy": policy,
        "text": text,
        "prompt_tokens": [1, *_ids(p["messages"][0]["content"], False)],
        "tokens": tokens,
        "logprobs": [-0.05 - 0.01 * ((j * 7 + s) % 40) for j in range(len(tokens))],
        "finish_reason": "stop" if stopped else "length",
        "engine": "hf",
        "temperature": t,
        "top_p": 1.0,
        "seed": 1000 + rnd,
    }


def _rollouts(rows: Rows, train: list[dict[str, Any]], rnd: int, rng: random.Random) -> None:
    for i, p in enumerate(train):
        if rnd == 1 and i == 18:
            continue  # kept from round 0, and too old to train on
        for s, status in enumerate(_statuses(i, rnd)):
            said = p["answer"] if status in ("ok", "timeout", "error") else str(rng.randrange(9))
            body = HOSTILE if i == 0 else "+".join("1" * rng.randrange(1, 9))
            text = body + ("" if status in ("truncated", "unparseable") else f">{said}")
            row = _policy_row(p, rnd, s, POLICIES[rnd], text, status != "truncated", 1.0)
            rows["rollouts"].append(row)
            _score(rows, "rollout", row, "rollout_id", status, None if status in ("truncated", "unparseable") else said)


def _grades_and_shards(rows: Rows, train: list[dict[str, Any]], rnd: int) -> None:
    verdicts = {s["id"]: s for s in rows["scores"]}
    for i, p in enumerate(train):
        source = 0 if rnd == 1 and i == 18 else rnd
        group = [r for r in rows["rollouts"] if r["prompt_id"] == p["prompt_id"] and r["round"] == source]
        group_scores = [verdicts[r["rollout_id"]] for r in group]
        traces = [t for t in rows["traces"] if t["prompt_id"] == p["prompt_id"] and verdicts[t["trace_id"]]["correct"]]
        right = sum(s["correct"] for s in group_scores)
        unjudged = sum(s["status"] in UNJUDGED for s in group_scores)
        grade = "hard" if right == 0 else "easy" if right == len(group) else "mid"
        reason = {"easy": "easy", "mid": "rl", "hard": "sft" if traces else "no_verified_trace"}[grade]
        reason = "too_long" if i == 17 else "stale" if source != rnd else reason
        reason = "unjudged" if unjudged else "incomplete_group" if len(group) < K else reason
        rows["grades"].append(
            {
                "prompt_id": p["prompt_id"],
                "round": rnd,
                "source_round": source,
                "policy": POLICIES[source],
                "k": len(group),
                "successes": right,
                "unjudged": unjudged,
                "grade": grade,
                "traces": len(traces),
                "reason": reason,
            }
        )
        if reason in ("rl", "sft"):
            _shard_rows(rows, rnd, source, reason, group if reason == "rl" else traces, group[0]["prompt_tokens"], verdicts)


def _shard_rows(rows: Rows, rnd: int, source: int, route: str, items: list, prompt_tokens: list, verdicts: dict) -> None:
    rl = route == "rl"
    rewards = [verdicts[x["rollout_id" if rl else "trace_id"]]["reward"] for x in items]
    spread = stdev(rewards) if len(rewards) > 1 else 0.0
    for x, reward in zip(items, rewards, strict=True):
        item = x["rollout_id" if rl else "trace_id"]
        rows["shards"].append(
            {
                "round": rnd,
                "source_round": source,
                "route": route,
                "prompt_id": x["prompt_id"],
                "item_id": item,
                "sample": x["sample"],
                "teacher": None if rl else x["teacher"],
                "policy": POLICIES[source],
                "temperature": 1.0,
                "prompt_tokens": prompt_tokens,
                "tokens": x["tokens"] if rl else _ids(x["text"], True),
                "old_logprobs": x["logprobs"] if rl else None,
                "finish_reason": x["finish_reason"],
                "reward": reward,
                "correct": verdicts[item]["correct"],
                "advantage": (reward - fmean(rewards)) / (spread + 1e-6) if rl else 0.0,
                "group_size": len(items) if rl else 1,
                "w_sft": float(not rl),
                "w_grpo": float(rl),
                "w_gal": float(rl),
            }
        )
        if rl:
            drift = [lp - 0.02 * rnd - 0.001 * (j % 3) for j, lp in enumerate(x["logprobs"])]
            rows["logprobs"].append(
                {"round": rnd, "role": "ref", "item_id": item, "model": POLICIES[0], "temperature": 1.0, "logprobs": drift}
            )


def _training(rows: Rows, rnd: int, rng: random.Random) -> None:
    shards = [s for s in rows["shards"] if s["round"] == rnd]
    prompts = sorted({s["prompt_id"] for s in shards})
    graded = [g["grade"] for g in rows["grades"] if g["round"] == rnd]
    for step in range(STEPS):
        position, hard = 0, 0
        for drawn in rng.sample(prompts, 4):
            group = [s for s in shards if s["prompt_id"] == drawn]
            hard += group[0]["route"] == "sft"
            for s in group if group[0]["route"] == "rl" else [rng.choice(group)]:
                moved = 0.02 * step if s["route"] == "rl" else None
                rows["draws"].append(
                    {k: s[k] for k in ("round", "item_id", "prompt_id", "route", "teacher")}
                    | {"step": step, "position": position, "age": rnd - s["source_round"]}
                    | {"log_ratio": moved, "kl": moved and moved**2 / 2, "clip_fraction": moved and float(step == STEPS - 1)}
                )
                position += 1
        x = rnd * STEPS + step
        wobble = math.sin(1.7 * x) + rng.gauss(0, 0.4)
        sft, grpo, gal = 1.4 * math.exp(-x / 14) + 0.05 * wobble, 0.02 * wobble, 0.69 * math.exp(-x / 60) + 0.01 * wobble
        values = {
            "loss/sft": sft,
            "loss/grpo": grpo,
            "loss/gal": gal,
            "loss/total": hard / 4 * sft + (4 - hard) / 4 * (grpo + gal) / 2,
            "grad_norm": 1.1 + 0.3 * wobble,
            "lr": 1e-3,
            "entropy": 0.9 * math.exp(-x / 40) + 0.02 * wobble,
            "clip_fraction": max(0.0, 0.06 + 0.02 * wobble),
            "ess": 0.97 - 0.01 * step + 0.005 * wobble,
            "kl": 0.002 * x,
            "reward": 0.4 + 0.012 * x + 0.04 * wobble,
            "completions/mean_length": 14 + 0.2 * x + wobble,
            "offline_ratio": hard / 4,
        } | {f"route/{g}_frac": graded.count(g) / len(graded) for g in ("easy", "mid", "hard")}
        rows["metrics"] += [
            {"round": rnd, "step": step, "name": n, "value": v, "when": 1.79e9 + x} for n, v in values.items()
        ]


def _evals(rows: Rows, prompts: list, rnd: int, step: int, policy: str, skill: float, rng: random.Random) -> None:
    for suite, source, ease, pass_k in (("sums", "held_out", 1.0, [SAMPLES]), ("longer", "longer", 0.5, [])):
        correct_PN = []
        for p in (p for p in prompts if p["source"] == source):
            luck = ease * min(1.0, max(0.0, rng.gauss(skill, 0.2)))
            correct_N = [rng.random() < luck for _ in range(SAMPLES)]
            correct_PN.append(correct_N)
            for s, right in enumerate(correct_N):
                said = p["answer"] if right else "0"
                row = _policy_row(p, rnd, s, policy, f"1+1>{said}", True, 0.6) | {"step": step, "suite": suite}
                rows["eval_rollouts"].append(row)
                _score(rows, "eval", row, "rollout_id", "ok" if right else "wrong", said)
        for metric, e in eval_metrics(correct_PN, pass_k).items():
            rows["evals"].append({"round": rnd, "step": step, "suite": suite, "metric": metric, "policy": policy, **vars(e)})
