"""What the benchmark's figures rest on, as far as it can be checked without TRL."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.scorers import math_answer
from tests.bench import score
from tests.bench.case import CASES, EOS, PAD, Case, make_model, make_shards, same_update, useful_flop
from tests.bench.machine import peak_mb, reset_peak, resident_mb
from tests.bench.ours import Ours, sampled_by
from tests.bench.where import ATTENTION, LINEAR, REST, VOCABULARY, bin_of, breakdown
from tests.tiny_runs import ROOT

SMALL = Case("small", 5, (6, 4, 3, 2), 1.0)


@pytest.mark.parametrize(("name", "slots"), [("32/64", 1.4), ("32/25", 3.3), ("256/64", 3.3), ("256/25", 5.6)])
def test_the_rows_have_the_slots_they_were_promised_with(name: str, slots: float) -> None:
    case = CASES[name]
    assert case.limit == pytest.approx(slots, abs=0.05)
    assert case.floor < case.limit
    assert sum(case.lengths) / case.k == pytest.approx(int(name.split("/")[1]), abs=1)


def test_every_group_has_the_lengths_of_its_row_and_both_kinds_of_reward(tmp_path) -> None:
    table = make_shards(CASES["32/25"], 9, make_model(tmp_path))
    for g in range(9):
        group = [row for row in table.to_pylist() if row["prompt_id"] == f"g{g}"]
        assert sorted(len(row["tokens"]) for row in group) == sorted(CASES["32/25"].lengths)
        assert len({row["reward"] for row in group}) == 2
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-5)
        assert all(row["tokens"][-1] == EOS and PAD not in row["tokens"] for row in group)


def test_useful_work_is_that_of_a_hand_count() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type(
                "C", (), {"num_attention_heads": 2, "hidden_size": 4, "num_hidden_layers": 3, "vocab_size": 7}
            )
            self.layer = torch.nn.Linear(4, 5, bias=False)
            self.lm_head = torch.nn.Linear(4, 7, bias=False)

    case = Case("by hand", 2, (3, 1), 1.0)
    # prompt 2, responses 3 and 1: pairs of the prompt 1 + 2; of the first response 3 + 4 + 5, of the second 3
    ours = 6 * 20 * 6 + 12 * 4 * 3 * (3 + 12 + 3) + 6 * 28 * 4
    theirs = 6 * 20 * 2 * 5 + 12 * 4 * 3 * 2 * (1 + 2 + 3 + 4 + 5) + 6 * 28 * 2 * 3
    assert useful_flop(Model(), case, 2) == (2 * theirs, 2 * ours)


def test_rows_sampled_by_the_policy_make_a_gradient_that_no_micro_batch_size_moves(tmp_path) -> None:
    model = make_model(tmp_path)
    shards = sampled_by(model, make_shards(SMALL, 2, model))
    sides = [Ours(model, shards, SMALL, batch=batch) for batch in (4, 8)]
    for side in sides:
        assert side.gradient() > 0
    one, two = (side.gradients() for side in sides)
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7) for name in one)
    before = [p.clone() for p in sides[0].model.parameters()]
    assert sides[0].update() > 0
    assert all(torch.equal(p, was) for p, was in zip(sides[0].model.parameters(), before, strict=True))


def test_two_gradients_that_differ_are_not_one_update() -> None:
    gradient = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert same_update(gradient, gradient | {"b": torch.tensor([[4.0 + 5e-5]])}) == pytest.approx(1e-5, rel=0.05)
    with pytest.raises(AssertionError, match="not the same update"):
        same_update(gradient, gradient | {"b": torch.tensor([[4.001]])})
    with pytest.raises(AssertionError, match="other parameters"):
        same_update(gradient, {"a": gradient["a"]})


def test_operators_are_binned_by_shape_then_name() -> None:
    assert bin_of("aten::mm", [[40, 256], [256, 512]], 512) == VOCABULARY
    assert bin_of("aten::mm", [[40, 256], [256, 688]], 512) == LINEAR
    assert bin_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward", [[1, 4, 9, 64]], 512) == ATTENTION
    assert bin_of("aten::silu", [[40, 688]], 512) == REST


def test_the_profile_finds_every_bin(tmp_path) -> None:
    model = make_model(tmp_path)
    ours = Ours(model, make_shards(SMALL, 1, model), SMALL, batch=4)
    bins, rest = breakdown(ours)
    assert set(bins) == {LINEAR, ATTENTION, VOCABULARY, REST}
    assert min(bins.values()) > 0
    assert sum(rest.values()) <= bins[REST] * 1.001


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_is_what_rose_since_the_reset_even_if_it_was_freed() -> None:
    held = bytearray(80 << 20)
    del held
    reset_peak()
    start = resident_mb()
    block = bytearray(40 << 20)
    del block
    assert 35 < peak_mb() - start < 60


def test_a_pinned_process_has_one_core_and_one_thread() -> None:
    code = "from tests.bench.machine import pin\npin()\nimport os, torch\nprint(len(os.sched_getaffinity(0)), torch.get_num_threads())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "1"]


def test_the_scoring_rows_hold_every_kind_of_answer_and_both_sides_judge_a_sample_alike() -> None:
    made = score.rows(60, seed=1)
    assert len(made) == 480
    assert 0.05 < sum("boxed" not in text for text, _ in made) / len(made) < 0.15
    sample = made[::16]
    ours = [math_answer.score(text, gold).correct for text, gold in sample]
    assert ours == [score.plain(row) for row in sample]
    assert set(ours) == {True, False}
