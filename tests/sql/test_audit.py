"""The audit's queries against numpy: rows in, numbers out."""

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import ask, sql
from schemas.tables import ARROW


def tables(seed: int, spread: float = 0.5) -> tuple[list[dict], list[dict]]:
    """(shards, logprobs): rollouts of two policies, lengths 1 to 9, and beside them all that an audit must not look at."""
    rng = np.random.default_rng(seed)
    shards, logprobs = [], []
    for i in range(14):
        n = int(rng.integers(1, 10))
        sampler = -rng.random(n) * 3
        shard = {
            "round": 1, "source_round": 1, "route": "rl", "prompt_id": f"q{i // 4}", "item_id": f"r{i:02}", "sample": i,
            "teacher": None, "policy": "pq"[i % 3 == 0], "temperature": 1.0, "prompt_tokens": [1],
            "tokens": rng.integers(3, 30, n).tolist(), "old_logprobs": sampler.tolist(), "finish_reason": "stop", "reward": 1.0,
            "correct": True, "advantage": 0.0, "group_size": 4, "w_sft": 0.0, "w_grpo": 1.0, "w_gal": 1.0,
        }  # fmt: skip
        shards.append(shard)
        row = {"round": 1, "role": "old", "item_id": shard["item_id"], "model": shard["policy"], "temperature": 1.0}
        logprobs.append(row | {"logprobs": (sampler + spread * rng.standard_normal(n)).tolist()})
        far = {"logprobs": (sampler + 99).tolist()}
        logprobs += [row | far | {"role": "ref"}, row | far | {"round": 0}]
        shards.append(shard | {"round": 0})
    shards.append(shards[0] | {"route": "sft", "item_id": "t0", "teacher": "t", "old_logprobs": None})
    shards.append(shards[0] | {"item_id": "other"})  # audited under a policy that did not sample it
    nines = {"logprobs": [9.0] * len(shards[0]["tokens"])}
    logprobs += [
        row | nines | {"item_id": "other", "model": "z"},
        row | nines | {"item_id": "t0", "model": shards[0]["policy"]},
    ]
    return shards, logprobs


def query(shards: list[dict], logprobs: list[dict], name: str) -> list[dict[str, Any]]:
    con = duckdb.connect()
    for table, rows in (("shards", shards), ("logprobs", logprobs)):
        con.register(f"{table}_in", pa.Table.from_pylist(rows, schema=ARROW[table]))
        con.execute(f"create table {table} as select * from {table}_in")
    con.execute(f"create view compared as {sql('audit/compared')}")
    return ask(con, sql(f"audit/{name}"), round=1).to_pylist()


def gaps_of(shards: list[dict], logprobs: list[dict], policy: str) -> dict[str, np.ndarray]:
    """Trainer minus sampler by item, float32 as stored."""
    old = {r["item_id"]: np.float32(r["logprobs"]) for r in logprobs if (r["round"], r["role"]) == (1, "old")}
    mine = [
        s for s in shards if s["round"] == 1 and s["route"] == "rl" and s["policy"] == policy and s["item_id"] != "other"
    ]
    return {s["item_id"]: old[s["item_id"]].astype(float) - np.float32(s["old_logprobs"]) for s in mine}


def effective(logs: np.ndarray) -> float:
    weights = np.exp(logs)
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=8)
def test_the_numbers_of_each_policy_are_those_of_numpy(seed: int) -> None:
    shards, logprobs = tables(seed)
    found = query(shards, logprobs, "policies")
    assert [row["policy"] for row in found] == ["p", "q"]
    for row in found:
        gaps = gaps_of(shards, logprobs, row["policy"])
        flat = np.concatenate(list(gaps.values()))
        assert (row["rows"], row["tokens"]) == (len(gaps), len(flat))
        assert row["mean_difference"] == pytest.approx(np.abs(flat).mean())
        assert row["max_difference"] == pytest.approx(np.abs(flat).max())
        assert row["kl"] == pytest.approx((np.exp(flat) - 1 - flat).mean())
        assert row["ess"] == pytest.approx(effective(flat))
        assert row["ess_sequence"] == pytest.approx(effective(np.array([g.sum() for g in gaps.values()])))


def test_weights_that_overflow_leave_an_effective_sample_size_of_one_in_n() -> None:
    shards, logprobs = tables(0, spread=0.0)
    next(r for r in logprobs if r["role"] == "old" and r["item_id"] == "r01")["logprobs"][0] = 900.0
    (p, q) = query(shards, logprobs, "policies")
    assert (p["ess"], p["ess_sequence"]) == pytest.approx((1 / p["tokens"], 1 / p["rows"]))
    assert (q["ess"], q["ess_sequence"]) == pytest.approx((1.0, 1.0))
    assert p["max_difference"] > 899


def test_the_worst_tokens_and_rows_of_each_policy_come_first() -> None:
    shards, logprobs = tables(3)
    by_item = {s["item_id"]: s for s in shards if s["round"] == 1 and s["route"] == "rl"}
    worst, rows = query(shards, logprobs, "tokens"), query(shards, logprobs, "rows")
    for policy in "pq":
        gaps = gaps_of(shards, logprobs, policy)
        want = sorted(((-abs(x), item, t) for item, gap in gaps.items() for t, x in enumerate(gap)))[:10]
        mine = [r for r in worst if r["policy"] == policy]
        assert [(r["item_id"], r["position"]) for r in mine] == [(item, t) for _, item, t in want]
        for r in mine:
            assert r["token"] == by_item[r["item_id"]]["tokens"][r["position"]]
            assert r["prompt_id"] == by_item[r["item_id"]]["prompt_id"]
            assert r["trainer"] - r["sampler"] == pytest.approx(gaps[r["item_id"]][r["position"]])
        by_row = sorted((-np.abs(gap).mean(), item) for item, gap in gaps.items())[:10]
        assert [r["item_id"] for r in rows if r["policy"] == policy] == [item for _, item in by_row]
        assert [r["mean_difference"] for r in rows if r["policy"] == policy] == pytest.approx([-x for x, _ in by_row])
