"""The gradient of a whole update: against the formula written out row by row, and blind to how it was split.

ALGORITHMS section 8, tests 1 to 5, 8, 13 and 16. Everything on a tiny Llama, rows of unequal lengths.
"""

from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from schemas.recipe import DypoMethod
from tests.trainer import by_hand
from tests.trainer.by_hand import gradient
from tests.trainer.tiny import (
    EOS,
    ExactLM,
    accumulate_as,
    exact_llama,
    make_old,
    make_ref,
    make_shards,
    policy_lm,
    shaped,
    tiny_llama,
)
from trainer.batch import pack, plan_micro_batches, slots, split, unit_sizes
from trainer.model import PolicyLM
from trainer.objective import Unit, count, micro_batch
from trainer.rows import Row, Shards
from trainer.step import Observed

METHODS = {
    "default": {},
    "paper": {"preset": "paper"},
    "official": {"preset": "official"},
    "old_reference": {"gal": {"ref": "old"}},
    "no_reference_sums": {"gal": {"ref": "none", "logp_reduction": "sum", "beta": 0.1}, "sft_reduction": "prompt"},
    "graded_pairs": {"gal": {"pairs": "reward"}},
    "grpo_only": {"alpha": 1.0},
    "gal_only": {"alpha": 0.0, "gamma": 0.0},
    "weights": {"alpha": 0.3, "gamma": 2.0, "grpo": {"clip_low": 0.1, "clip_high": 0.4}},
    "dapo": {"grpo": {"aggregation": "token-mean", "clip_high": 0.28, "mask_truncated": True}},
    "dr_grpo": {"grpo": {"aggregation": "seq-mean-token-sum-norm", "horizon": 7}, "gal": {"ref": "old"}},
    "cispo": {"grpo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"}},
    "dual_clip": {"grpo": {"dual_clip": 1.3, "clip_high": 0.1}},
    "dual_clip_sequence": {"grpo": {"ratio": "sequence", "dual_clip": 1.3}},
    "truncated": {"grpo": {"old": "trainer", "truncation": "token", "truncation_cap": 1.1}, "gal": {"ref": "old"}},
    "truncated_rows": {"grpo": {"old": "trainer", "truncation": "sequence", "ratio": "sequence", "truncation_cap": 1.1}},
    "kl": {"alpha": 1.0, "grpo": {"kl": 0.5}},
    "all_of_it": {
        "grpo": {
            **{"old": "trainer", "truncation": "token", "kl": 0.2, "dual_clip": 1.5, "mask_truncated": True},
            **{"aggregation": "seq-mean-token-sum-norm", "horizon": 5},
        }
    },
}


def method_of(name: str) -> DypoMethod:
    return DypoMethod.model_validate(METHODS[name])


def units_of(*, hard: int = 3, mid: int = 3, k: int = 4, seed: int = 0, name: str = "default") -> list[Unit]:
    """Hard rows and whole groups as the method reads them, with stored log-probs."""
    table = make_shards(hard=hard, mid=mid, k=k, teachers=1, traces=1, seed=seed)
    return units_from(table, make_ref(table), method_of(name))


def units_from(table: pa.Table, ref: pa.Table, method: DypoMethod) -> list[Unit]:
    old = make_old(table) if method.grpo.old == "trainer" else None
    shards = Shards(table, ref, old, mask_truncated=method.grpo.mask_truncated, pairs=method.gal.pairs)
    units: dict[str, list[tuple[str, str]]] = {}
    for row in table.to_pylist():
        units.setdefault(row["prompt_id"], []).append((row["route"], row["item_id"]))
    return [shards.rows(keys) for keys in units.values()]


def update(
    units: list[Unit], name: str, *, budget: int = 10_000, model: PolicyLM | None = None
) -> tuple[torch.Tensor, Observed]:
    model = model or policy_lm()
    seen = accumulate_as(model, units, count(units, len(units)), method_of(name), micro_batch_tokens=budget)
    return gradient(model), seen


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert (a - b).norm() <= tolerance * b.norm(), f"relative difference {(a - b).norm() / b.norm():.2e}"


# ---------------------------------------------------------------- the dumbest version
def logps_alone(model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    """One row, no padding, full logits."""
    ids = torch.tensor([[*row.prompt_tokens.tolist(), *row.tokens.tolist()]])
    logits = model(input_ids=ids).logits[0] / row.temperature
    logps = torch.log_softmax(logits, -1)
    at = len(row.prompt_tokens)
    return torch.stack([logps[at + t - 1, row.tokens[t]] for t in range(len(row.tokens))])


@pytest.mark.parametrize("name", METHODS)
def test_the_mixture_equals_the_formula_written_out_row_by_row_from_the_tables(name: str) -> None:
    """Also where rewards are shaped: GAL's pairs are right against wrong, whatever the reward and the advantage say, unless
    the recipe wants them by reward."""
    table = shaped(make_shards(hard=3, mid=3, teachers=1, traces=1))
    ref, method = make_ref(table), method_of(name)
    rows, units = by_hand.with_old(table.to_pylist(), make_old(table)), units_from(table, ref, method)
    for make in (ExactLM, exact_llama):
        got, seen = update(units, name, budget=60, model=policy_lm(make))
        model = make()
        parts = by_hand.losses(by_hand.forward_each(model, rows), rows, by_hand.reference(ref), method)
        loss = by_hand.total(parts, rows, method, n=6)
        loss.backward()
        assert seen.total == pytest.approx(loss.item(), rel=1e-10)
        assert_same(got, gradient(model), 1e-10)


# ---------------------------------------------------------------- splitting
@given(budget=st.integers(1, 400), order=st.randoms(use_true_random=False), name=st.sampled_from(sorted(METHODS)))
@settings(deadline=None, max_examples=12)
def test_the_gradient_does_not_see_the_split_or_the_order(budget: int, order: object, name: str) -> None:
    units = units_of(name=name)
    whole, _ = update(units, name)
    shuffled = list(units)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    split, _ = update(shuffled, name, budget=budget)
    assert_same(split, whole, 1e-10)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_one_row_at_a_time_equals_all_in_one_on_a_llama(name: str, dtype: torch.dtype, tolerance: float) -> None:
    units = units_of(name=name)
    one_each, _ = update(units, name, budget=1, model=policy_lm(lambda: tiny_llama().to(dtype)))
    together, _ = update(units, name, model=policy_lm(lambda: tiny_llama().to(dtype)))
    assert_same(one_each, together, tolerance)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_shares_of_an_update_add_up_to_it_when_the_counts_are_the_whole_updates(name: str, world: int) -> None:
    units = units_of(name=name)
    whole, _ = update(units, name)
    model = policy_lm()
    for rank in range(world):
        accumulate_as(model, units[rank::world], count(units, len(units)), method_of(name), micro_batch_tokens=60)
    assert_same(gradient(model), whole, 1e-10)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gal_only"])  # whose Hard rows weigh nothing
def test_dropping_or_perturbing_any_one_of_the_micro_batches_changes_the_gradient(name: str) -> None:
    """K >= 3, since an accumulation that keeps the first and the last looks right at K = 2 (ALGORITHMS 5.1)."""
    units = units_of(hard=2, mid=2, name=name)
    whole, _ = update(units, name, budget=1)
    assert len(plan_micro_batches([slots(unit) for unit in units], 1)) == 4
    counts = count(units, len(units))
    for dropped in range(len(units)):
        model = policy_lm()
        rest = [u for i, u in enumerate(units) if i != dropped]
        accumulate_as(model, rest, counts, method_of(name), micro_batch_tokens=1)
        part = gradient(model)
        assert (part - whole).norm() > 1e-3 * whole.norm()
        accumulate_as(model, [units[dropped]], counts, method_of(name), micro_batch_tokens=1)
        assert_same(gradient(model), whole, 1e-10)


@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 100), st.integers(1, 4))
@settings(deadline=None)
def test_micro_batches_hold_every_unit_once_keep_to_the_budget_and_are_balanced(
    sizes: list[int], budget: int, ranks: int
) -> None:
    plan = plan_micro_batches(sizes, budget, ranks)
    places = [units for by_rank in plan for units in by_rank]
    assert all(len(by_rank) == ranks for by_rank in plan)
    assert sorted(i for units in places for i in units) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in units) for units in places]
    assert all(load <= budget or len(units) == 1 for load, units in zip(loads, places, strict=True))
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(st.integers(1, 60), st.sampled_from([True, False]))
@settings(deadline=None)
def test_a_unit_larger_than_the_budget_is_cut_into_pieces_that_fit(budget: int, share: bool) -> None:
    (unit,) = units_of(hard=0, mid=1, k=6)
    pieces = split(unit, budget, share=share)
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(len(unit)))
    for start, stop in pieces:
        assert stop - start == 1 or slots(unit[start:stop], share=share) <= budget


def test_slots_are_the_tokens_that_a_packed_row_holds_or_the_padded_rectangle() -> None:
    rows = [row for unit in units_of() for row in unit]
    assert slots(rows) == len(pack(rows).input_ids_S)
    lengths = [block.stop - block.start for block in pack(rows, share=False).blocks]
    assert slots(rows, share=False) == len(rows) * max(lengths) > sum(lengths) > slots(rows)


@given(st.integers(1, 400))
@settings(deadline=None)
def test_a_model_that_is_not_packed_never_runs_more_padded_slots_than_the_budget(budget: int) -> None:
    units = units_of()
    sizes = unit_sizes(units, share=False)
    for (chosen,) in plan_micro_batches(sizes, budget):
        rows = [row for i in chosen for row in units[i]]
        for start, stop in split(rows, budget, share=False) if len(chosen) == 1 else [(0, len(rows))]:
            assert stop - start == 1 or slots(rows[start:stop], share=False) <= budget


# ---------------------------------------------------------------- what must not move the weights
def test_other_groups_and_siblings_have_exactly_no_gradient() -> None:
    """What a response's log-probs depend on: its prompt and itself."""
    rows = [row for unit in units_of() for row in unit]
    batch = pack(rows)
    model = policy_lm(tiny_llama)
    taken: list[torch.Tensor] = []
    model.lm.get_input_embeddings().register_forward_hook(lambda m, i, out: (out.retain_grad(), taken.append(out))[0])
    logps_BT, _ = model(batch)
    at = next(i for i, row in enumerate(rows) if row.route == "rl") + 1
    block = next(b for b in batch.blocks if len(b.responses) > 1)
    logps_BT[at].sum().backward()
    grad_SH = taken[0].grad[0]  # type: ignore[index]
    mine = block.start + block.prompt + block.responses[0]
    seen = [*range(block.start, block.start + block.prompt), *range(mine, mine + block.responses[1])]
    assert grad_SH[seen].abs().sum(-1).min() > 0
    grad_SH[seen] = 0
    assert grad_SH.abs().max() == 0


def test_prompt_tokens_are_not_targets() -> None:
    rows = [row for unit in units_of() for row in unit]
    batch = pack(rows)
    assert batch.target_N.tolist() == [token for row in rows for token in row.tokens.tolist()]
    assert batch.by_row(batch.target_N)[1, : len(rows[1].tokens)].tolist() == rows[1].tokens.tolist()


@pytest.mark.parametrize("correct", [True, False])
def test_a_group_all_right_or_all_wrong_has_exactly_no_gradient(correct: bool) -> None:
    units = [[Row(**{**vars(r), "correct": correct, "advantage": 0.0}) for r in u] for u in units_of(hard=0)]
    grad, seen = update(units, "default")
    assert grad.abs().max() == 0
    assert seen.total == 0


def test_the_last_token_of_a_trace_is_trained_on_and_it_is_the_end_of_sequence() -> None:
    """Raising only the end-of-sequence weight of the head lowers the loss of a row whose gradient sees it."""
    (unit,) = units_of(hard=1, mid=0)
    assert unit[0].tokens[-1] == EOS
    whole, _ = update([unit], "default")
    without = [Row(**{**vars(unit[0]), "tokens": unit[0].tokens[:-1]})]
    model = policy_lm()
    accumulate_as(model, [without], count([unit], 1), method_of("default"), micro_batch_tokens=1000)
    eos_only = whole - gradient(model)
    model = exact_llama()
    (-logps_alone(model, unit[0])[-1] / len(unit[0].tokens)).backward()
    assert_same(eos_only, gradient(model), 1e-10)
    assert eos_only.norm() > 1e-3


# ---------------------------------------------------------------- GAL is there
def test_gal_moves_the_weights_and_the_first_release_s_constant_would_not() -> None:
    units = units_of(hard=0)
    gal, seen = update(units, "gal_only")
    assert gal.norm() > 1e-2
    assert seen.gal > 0
    additive = METHODS["official"] | {"gal_weight": 0.1}
    METHODS["official_loud"], METHODS["official_99d3476"] = additive, METHODS["official"] | {"gal_weight": 0.0}
    try:
        with_gal, without = update(units, "official_loud")[0], update(units, "official_99d3476")[0]
    finally:
        del METHODS["official_loud"], METHODS["official_99d3476"]
    assert (with_gal - without).norm() > 1e-4


def test_the_cosine_of_grpo_and_gal_is_one_where_they_are_collinear() -> None:
    """On-policy, equal lengths of one token, GAL's reference the sampler: ALGORITHMS section 1."""
    units = units_of(hard=0, mid=1)
    model = exact_llama()
    on_policy = []
    for row in units[0]:
        one_token = Row(**{**vars(row), "tokens": row.tokens[:1], "ref_logps": None})
        old = logps_alone(model, one_token).detach().numpy()
        on_policy.append(Row(**{**vars(one_token), "old_logps": old}))
    _, seen = update([on_policy], "old_reference")
    assert seen.grpo_dot_gal / (seen.grpo_square * seen.gal_square) ** 0.5 == pytest.approx(1.0, abs=1e-10)
    _, off = update(units, "default")
    assert off.grpo_dot_gal / (off.grpo_square * off.gal_square) ** 0.5 < 0.999


# ---------------------------------------------------------------- empty sides
@pytest.mark.parametrize(("hard", "mid"), [(2, 0), (0, 2)])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_without_hard_or_without_mid_prompts_is_finite_and_only_the_other_term(
    hard: int, mid: int, name: str
) -> None:
    units = units_of(hard=hard, mid=mid, name=name)
    grad, seen = update(units, name)
    assert torch.isfinite(grad).all()
    assert (seen.sft != 0, seen.grpo != 0) == (hard > 0, mid > 0)
    assert (seen.counts.hard, seen.counts.mid) == (hard, mid)


def test_shard_weights_scale_their_term_and_leave_the_denominators_alone() -> None:
    units = units_of()

    def weighted(**weights: float) -> list[Unit]:
        return [[Row(**{**vars(r), **{w: x * getattr(r, w) for w, x in weights.items()}}) for r in u] for u in units]

    parts: dict[str, Callable[[Observed], float]] = {
        "w_sft": lambda s: s.sft,
        "w_grpo": lambda s: s.grpo,
        "w_gal": lambda s: s.gal,
    }
    _, plain = update(units, "default")
    for weight, part in parts.items():
        _, half = update(weighted(**{weight: 0.5}), "default")
        for other, read in parts.items():
            assert read(half) == pytest.approx(read(plain) * (0.5 if other == weight else 1.0)), (weight, other)
        assert part(half) != part(plain)


def test_counting_easy_prompts_scales_the_whole_loss() -> None:
    units = units_of()
    model = policy_lm()
    accumulate_as(model, units, count(units, 6), method_of("default"), micro_batch_tokens=100, easy_scale=0.6)
    assert_same(gradient(model), 0.6 * update(units, "default")[0], 1e-10)


# ---------------------------------------------------------------- rows that were cut, and rows that are long
def test_masked_rollouts_give_no_gradient_and_still_count_in_the_denominators() -> None:
    """Their log-probs can be anything; the others' share stays what it was among all rows."""
    units = units_of(hard=0, name="all_of_it")
    masked = [row for unit in units for row in unit if row.masked]
    assert len(masked) == len(units)
    whole, seen = update(units, "all_of_it")
    junk = [
        [Row(**{**vars(r), "old_logps": r.old_logps - 3, "advantage": 9.0, "correct": not r.correct}) if r.masked else r for r in u]
        for u in units
    ]  # fmt: skip
    other, again = update(junk, "all_of_it")
    assert torch.equal(other, whole)
    assert (again.total, again.counts) == (seen.total, seen.counts)
    unmasked, kept = update([[Row(**{**vars(r), "masked": False}) for r in u] for u in units], "all_of_it")
    assert (unmasked - whole).norm() > 1e-3 * whole.norm()
    assert (kept.counts.rl_tokens, kept.counts.rows) == (seen.counts.rl_tokens, seen.counts.rows)
    assert kept.counts.pairs > seen.counts.pairs == len(seen.margins) > 0


@pytest.mark.parametrize("name", ["all_of_it", "dapo"])
def test_an_update_whose_rollouts_are_all_masked_moves_nothing(name: str) -> None:
    units = [[Row(**{**vars(r), "masked": True}) for r in u] for u in units_of(hard=0, name=name)]
    grad, seen = update(units, name)
    assert grad.abs().max() == 0
    assert seen.total == 0
    assert seen.counts.pairs == 0


@pytest.mark.parametrize("name", ["default", "dapo", "dr_grpo", "all_of_it"])
def test_a_longer_neighbour_pads_more_and_changes_nothing_of_the_policy_gradient(name: str) -> None:
    """ALGORITHMS test 22: a denominator that is the longest row of a batch would."""
    units = units_of(hard=1, mid=2, name=name)
    ((hard,), *groups) = units
    long = Row(**{**vars(hard), "tokens": hard.tokens.repeat(9)})
    (_, short), (_, padded) = update([[hard], *groups], name), update([[long], *groups], name)
    assert padded.grpo == pytest.approx(short.grpo, rel=1e-12)
    assert padded.grpo_square == pytest.approx(short.grpo_square, rel=1e-12)


def test_a_constant_horizon_keeps_the_weight_of_a_token_whatever_the_length_of_its_row() -> None:
    """Dr.GRPO: a row's gradient is in proportion to its tokens; and twice the horizon is half the loss."""
    (unit,) = units_of(hard=0, mid=1, name="dr_grpo")
    batch = micro_batch([unit], count([unit], 1), method_of("dr_grpo").loss)
    assert {len(row.tokens) for row in unit} != {len(unit[0].tokens)}
    assert batch.grpo_share_B.tolist() == [1 / (7 * len(unit))] * len(unit)
    by_length = micro_batch([unit], count([unit], 1), method_of("default").loss).grpo_share_B
    assert by_length.tolist() == pytest.approx([1 / (len(row.tokens) * len(unit)) for row in unit])
