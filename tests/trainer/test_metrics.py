"""Every metric of a step against the same number worked out by hand from the tables (by_hand.py)."""

from pathlib import Path

import pyarrow as pa
import pytest

from schemas.tables import ARROW
from tests.trainer import by_hand
from tests.trainer.tiny import FolderSink, make_job, make_old, make_ref, make_shards, make_train, shaped, tiny_llama
from trainer.run import train_round
from trainer.schedule import plan_round

STILL = 1e-30  # a rate that moves no float32 weight, so that both updates of a step see the same policy
METHODS = {
    "default": {"gal": {"beta": 6.0}},
    "sequence": {"grpo": {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.4}, "gal": {"ref": "old", "beta": 6.0}},
    "queue": {"preset": "official", "queue_size": 3, "queue_groups": 2, "gal": {"beta": 0.3}},
    "care": {
        "grpo": {
            **{
                "old": "trainer",
                "truncation": "token",
                "truncation_cap": 1.1,
                "kl": 0.3,
                "dual_clip": 1.2,
                "clip_high": 0.1,
            },
            **{"mask_truncated": True, "aggregation": "token-mean"},
        },
        "gal": {"ref": "none", "beta": 2.0},
    },
    "rows": {
        "grpo": {"old": "trainer", "truncation": "sequence", "truncation_cap": 1.1, "ratio": "sequence", "clip_low": 0.1},
        "gal": {"beta": 6.0},
    },
    "cispo": {"grpo": {"surrogate": "cispo", "clip_low": 0.9, "clip_high": 1.0}, "gal": {"beta": 6.0}},
    "prompts": {"preset": "paper", "alpha": 0.3, "gamma": 2.0, "sft_reduction": "prompt", "gal": {"beta": 6.0}},
}
CLIPPED = {"clip_norm": 0.01, "warmup_steps": 2}


def metrics_of(sink: FolderSink, step: int = 0) -> dict[str, float]:
    return {row["name"]: row["value"] for row in sink.rows("metrics") if row["step"] == step}


def drawn(sink: FolderSink, shards: pa.Table, step: int = 0) -> list[dict]:
    rows = {row["item_id"]: row for row in shards.to_pylist()}
    return [rows[row["item_id"]] for row in sink.rows("draws") if row["step"] == step]


@pytest.mark.parametrize("name", METHODS)
def test_every_metric_of_a_step_is_the_number_that_the_tables_give_by_hand(
    name: str, policy_folder: Path, tmp_path: Path
) -> None:
    queue = name == "queue"
    rates = {"lr": STILL} | ({"sft_lr": 2 * STILL} if queue else {})
    train = make_train(METHODS[name] | rates, steps=1, prompts_per_step=8, optimizer=CLIPPED)
    shards, sink = shaped(make_shards()), FolderSink(tmp_path)
    ref, old, method = make_ref(shards), make_old(shards), train.method
    job = make_job(policy_folder, sink, shards=shards, ref=ref, train=train, round=2, rounds=3)
    train_round(job)

    model, rows, logps = tiny_llama(), by_hand.with_old(drawn(sink, shards), old), by_hand.reference(ref)
    hard, mid = [r for r in rows if r["route"] == "sft"], [r for r in rows if r["route"] == "rl"]
    assert (len(hard), len(by_hand.groups_of(mid))) == (3 if queue else 4, 4)
    want = by_hand.metrics(model, rows, logps, method)
    want |= {"route/easy_frac": 0.2, "route/mid_frac": 0.4, "route/hard_frac": 0.4, "lr": STILL / 2}
    want |= {"denom/prompts": 7 if queue else 8}
    updates = {"": (mid, 4), "_sft": (hard, 3)} if queue else {"": (rows, 8)}
    want["loss/total"] = 0.0
    for suffix, (mine, n) in updates.items():
        parts = by_hand.losses(by_hand.forward_each(model, mine), mine, logps, method)
        want["loss/total"] += by_hand.total(parts, mine, method, n).item()
        want[f"grad_norm{suffix}"] = by_hand.gradient_of(model, mine, logps, method, n).norm().item()
    if queue:
        want |= {"lr_sft": STILL, "queue/hard_waiting": 1, "queue/mid_waiting": 0, "queue/mid_dropped": 0}
    got = metrics_of(sink)
    assert got.pop("tokens_per_s") > 0
    assert got == pytest.approx(want, rel=1e-4, abs=1e-5 * STILL)
    now = by_hand.forward_each(model, rows)
    columns = ("log_ratio", "kl", "clip_fraction")
    for row, draw in zip(rows, sink.rows("draws"), strict=True):
        found = {c: draw[c] for c in columns}
        if row["route"] == "sft":
            assert set(found.values()) == {None}
        else:
            assert found == pytest.approx(by_hand.row_numbers(row, now, method), rel=1e-4, abs=1e-6)
    # what the numbers have to be for the comparison to tell right from wrong
    assert 0 < want["clip_fraction"] < 1
    assert want["gal/saturated"] not in (0, 0.5, 1)
    assert abs(want["gal/corr_d_length"]) > 0.05
    assert 0 < want.get("mismatch/truncated", 0.5) < 1
    assert want["grad_norm"] > 2 * CLIPPED["clip_norm"]


def test_a_prompt_with_both_routes_counts_once_in_n(policy_folder: Path, tmp_path: Path) -> None:
    rows = make_shards(hard=2, mid=2).to_pylist()
    prompt = next(row["prompt_tokens"] for row in rows if row["prompt_id"] == "m0")
    for row in rows:
        if row["prompt_id"] == "h0":
            row |= {"prompt_id": "m0", "prompt_tokens": prompt}
    shards, sink = pa.Table.from_pylist(rows, ARROW["shards"]), FolderSink(tmp_path)
    ref, train = make_ref(shards), make_train(steps=1, prompts_per_step=3)
    train_round(make_job(policy_folder, sink, shards=shards, ref=ref, train=train))
    mine, got = drawn(sink, shards), metrics_of(sink)
    assert sorted({(r["prompt_id"], r["route"]) for r in mine}) == [("h1", "sft"), ("m0", "rl"), ("m0", "sft"), ("m1", "rl")]
    parts = by_hand.losses(by_hand.forward_each(tiny_llama(), mine), mine, by_hand.reference(ref), train.method)
    assert got["denom/prompts"] == 3
    assert got["loss/total"] == pytest.approx(by_hand.total(parts, mine, train.method, n=3).item(), rel=1e-4)
    assert got["offline_ratio"] == 0.5


def test_counting_easy_prompts_scales_a_round_s_loss_by_the_gated_share_of_its_prompts(
    policy_folder: Path, tmp_path: Path
) -> None:
    found = {}
    for normalise in ("gated", "all"):
        sink = FolderSink(tmp_path / normalise)
        train = make_train({"normalise": normalise}, steps=1, prompts_per_step=8)
        train_round(make_job(policy_folder, sink, train=train, graded={"easy": 5, "mid": 4, "hard": 4}))
        found[normalise] = metrics_of(sink)
    for name in ("loss/total", "grad_norm"):
        assert found["all"][name] == pytest.approx(8 / 13 * found["gated"][name], rel=1e-5)
    assert found["all"]["loss/sft"] == found["gated"]["loss/sft"]


def test_what_waits_in_the_queues_and_what_was_dropped_add_up_to_what_was_drawn(policy_folder: Path, tmp_path: Path) -> None:
    """2 Mid groups never come together in time for an update of 6, so all are dropped after a step of waiting."""
    sink, shards = FolderSink(tmp_path), make_shards()
    train = make_train(
        {"schedule": "queue", "sft_lr": 1e-2, "queue_size": 3, "queue_groups": 6}, steps=6, prompts_per_step=3
    )
    train_round(make_job(policy_folder, sink, train=train, shards=shards))
    entered = plan_round(shards, make_train(steps=6, prompts_per_step=3), seed=3, round=0)  # the same visits, not queued
    hard = mid = trained = dropped = 0
    for step in entered:
        got = metrics_of(sink, step.index)
        routes = [v.route for v in step.updates[0].visits]
        hard, mid = hard + routes.count("sft"), mid + routes.count("rl")
        rows = drawn(sink, shards, step.index)
        trained += sum(r["route"] == "sft" for r in rows)
        assert not by_hand.groups_of(rows)
        dropped += got["queue/mid_dropped"]
        assert got["queue/hard_waiting"] == hard - trained
        assert got["queue/mid_waiting"] == mid - dropped
        assert got["denom/prompts"] == sum(r["route"] == "sft" for r in rows)
    assert trained > 0
    assert dropped > 0
