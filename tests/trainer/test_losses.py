"""The losses against the dumbest loops that can be written, and the identities of ALGORITHMS sections 1, 7 and 8."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import (
    cispo,
    clipped_surrogate,
    group_alignment,
    grpo_advantages,
    k3,
    pair_margins,
    sequence_surrogate,
    sft,
    truncated_weights,
)

F64 = torch.float64
FEW = settings(deadline=None, max_examples=20)


def group(k: int, right: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps, ref, rewards) of a group, in float64, right answers scattered."""
    torch.manual_seed(seed)
    rewards = (torch.randperm(k) < right).to(F64)
    return (-3 * torch.rand(k, dtype=F64)).requires_grad_(), -3 * torch.rand(k, dtype=F64), rewards


# ---------------------------------------------------------------- advantages
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9))
@FEW
def test_advantages_equal_a_loop(rewards: list[int]) -> None:
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    got = grpo_advantages(torch.tensor(rewards, dtype=F64))
    centred = grpo_advantages(torch.tensor(rewards, dtype=F64), scale="none")
    for r, a, c in zip(rewards, got.tolist(), centred.tolist(), strict=True):
        assert a == pytest.approx((r - mean) / (std + 1e-6), abs=1e-12)
        assert c == pytest.approx(r - mean, abs=1e-12)


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([True, True]),
        torch.tensor([0, 0, 0]),
        torch.tensor([0.1, 0.1, 0.1]),
        torch.tensor([1.0]),
        torch.tensor([]),
    ],
)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_without_contrast_has_exactly_zero_advantages(rewards: torch.Tensor, scale: str) -> None:
    got = grpo_advantages(rewards, scale=scale)
    assert got.shape == rewards.shape
    assert torch.equal(got, torch.zeros(len(rewards)))


def test_advantages_take_bools_ints_and_lists_alike() -> None:
    want = grpo_advantages(torch.tensor([1.0, 0.0, 0.0]))
    for same in (torch.tensor([True, False, False]), torch.tensor([1, 0, 0]), [1, 0, 0]):
        torch.testing.assert_close(grpo_advantages(same), want, rtol=0, atol=0)


def test_advantages_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(ValueError, match="scale"):
        grpo_advantages(torch.tensor([0.0, 1.0]), scale="max")
    with pytest.raises(ValueError, match="finite"):
        grpo_advantages(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="shape"):
        grpo_advantages(torch.zeros(2, 2))


# ---------------------------------------------------------------- surrogate
def surrogate_loop(logp: float, old: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, clipped * advantage)


@given(st.integers(0, 10_000))
@FEW
def test_clipped_surrogate_equals_a_triple_loop(seed: int) -> None:
    torch.manual_seed(seed)
    logps_BT, old_BT = torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    advantages_B = torch.randn(3, dtype=F64)
    got = clipped_surrogate(logps_BT, old_BT, advantages_B[:, None], clip_low=0.2, clip_high=0.28)
    for b in range(3):
        for t in range(5):
            want = surrogate_loop(logps_BT[b, t].item(), old_BT[b, t].item(), advantages_B[b].item(), 0.2, 0.28)
            assert got[b, t].item() == pytest.approx(want, rel=1e-12)


def test_at_ratio_one_the_surrogate_is_reinforce() -> None:
    logps = torch.randn(4, dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    clipped_surrogate(logps, logps, advantages, clip_low=0.2, clip_high=0.2).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


def test_the_surrogate_stops_pushing_beyond_its_clip_and_stays_finite_far_away() -> None:
    old = torch.zeros(4, dtype=F64)
    logps = torch.tensor([math.log(1.3), math.log(0.7), math.log(1.3), 900.0], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=F64)
    loss = clipped_surrogate(logps, old, advantages, clip_low=0.2, clip_high=0.2)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 0.0, 1.3, 0.0], dtype=F64))


def test_the_surrogate_refuses_shapes_that_would_broadcast_by_accident() -> None:
    with pytest.raises(ValueError, match="old_logps"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="broadcast"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="clip"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip_low=-0.2, clip_high=0.2)


@given(st.integers(0, 10_000))
@FEW
def test_the_sequence_surrogate_equals_a_loop_and_spreads_its_gradient_evenly(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = [1, 4, 6]
    logps_BT, old_BT = 0.3 * torch.randn(3, 6, dtype=F64), 0.3 * torch.randn(3, 6, dtype=F64)
    logps_BT.requires_grad_()
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages_B = torch.randn(3, dtype=F64)
    got_BT = sequence_surrogate(logps_BT, old_BT, mask_BT, advantages_B, clip_low=0.2, clip_high=0.2)
    got_BT.sum().backward()
    assert logps_BT.grad is not None
    for b, length in enumerate(lengths):
        mean = sum((logps_BT[b, t] - old_BT[b, t]).item() for t in range(length)) / length
        want = surrogate_loop(mean, 0.0, advantages_B[b].item(), 0.2, 0.2)
        ratio, advantage = math.exp(mean), advantages_B[b].item()
        bound = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        for t in range(6):
            assert got_BT[b, t].item() == pytest.approx(want if t < length else 0.0, rel=1e-12)
            slope = -ratio * advantage if t < length and not bound else 0.0
            assert logps_BT.grad[b, t].item() == pytest.approx(slope, rel=1e-12)


@given(st.integers(0, 10_000), st.floats(1.01, 4.0))
@FEW
def test_dual_clip_bounds_what_a_wrong_answer_costs_and_touches_nothing_else(seed: int, bound: float) -> None:
    torch.manual_seed(seed)
    logps, old = (torch.randn(40, dtype=F64) for _ in range(2))
    logps.requires_grad_()
    advantages = torch.randn(40, dtype=F64)
    loss = clipped_surrogate(logps, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=bound)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    for t in range(40):
        advantage, ratio = advantages[t].item(), math.exp((logps[t] - old[t]).item())
        plain = surrogate_loop(logps[t].item(), old[t].item(), advantage, 0.2, 0.2)
        bounded = advantage < 0 and ratio > bound
        assert loss[t].item() == pytest.approx(-bound * advantage if bounded else plain, rel=1e-12)
        clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert grad[t].item() == pytest.approx(0.0 if bounded or clipped else -ratio * advantage, rel=1e-12)


def test_dual_clip_bounds_the_sequence_ratio_too() -> None:
    old_BT, mask_BT = torch.zeros(2, 2, dtype=F64), torch.ones(2, 2, dtype=torch.bool)
    logps_BT = torch.tensor([[0.9, 1.1], [0.2, 0.3]], dtype=F64, requires_grad=True)
    minus = -torch.ones(2, dtype=F64)
    loss_BT = sequence_surrogate(logps_BT, old_BT, mask_BT, minus, clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    assert loss_BT.flatten().tolist() == pytest.approx([2.0, 2.0, math.exp(0.25), math.exp(0.25)])
    (grad_BT,) = torch.autograd.grad(loss_BT.sum(), logps_BT)
    assert grad_BT.flatten().tolist() == pytest.approx([0.0, 0.0, math.exp(0.25), math.exp(0.25)])


def test_dual_clip_refuses_a_bound_that_on_policy_tokens_pass() -> None:
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.ones(2), clip_low=0.2, clip_high=0.2, dual_clip=1.0)


@given(st.integers(0, 10_000), st.sampled_from([(0.2, 0.28), (1.0, 4.0), (0.5, 0.1)]))
@FEW
def test_cispo_equals_a_loop_and_its_gradient_is_never_zeroed_by_clipping(seed: int, bounds: tuple[float, float]) -> None:
    """ALGORITHMS test 15. Ratios from e^-6 to e^6, so that both bounds are met."""
    torch.manual_seed(seed)
    low, high = bounds
    logps_BT, old_BT = 2 * torch.randn(3, 30, dtype=F64), 2 * torch.randn(3, 30, dtype=F64)
    logps_BT.requires_grad_()
    advantages_B = torch.randn(3, dtype=F64)
    loss_BT = cispo(logps_BT, old_BT, advantages_B[:, None], clip_low=low, clip_high=high)
    (grad_BT,) = torch.autograd.grad(loss_BT.sum(), logps_BT)
    met = set()
    for b in range(3):
        for t in range(30):
            logp, advantage = logps_BT[b, t].item(), advantages_B[b].item()
            ratio = math.exp(logp - old_BT[b, t].item())
            weight = min(max(ratio, 1 - low), 1 + high)
            met.add((weight > ratio) - (weight < ratio))
            assert loss_BT[b, t].item() == pytest.approx(-weight * advantage * logp, rel=1e-12)
            assert grad_BT[b, t].item() == pytest.approx(-weight * advantage, rel=1e-12)
    assert grad_BT.abs().min() > 0
    assert met >= ({-1, 0} if low == 1.0 else {-1, 0, 1}), "clip_low = 1 leaves small ratios as they are"


# ---------------------------------------------------------------- truncation
@given(st.integers(0, 10_000), st.sampled_from(["token", "sequence"]), st.floats(0.5, 3.0))
@FEW
def test_truncated_weights_equal_a_loop_and_carry_no_gradient(seed: int, level: str, cap: float) -> None:
    torch.manual_seed(seed)
    lengths = [1, 4, 6]
    old_BT = torch.randn(3, 6, dtype=F64, requires_grad=True)
    sampler_BT = torch.randn(3, 6, dtype=F64)
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    got_BT = truncated_weights(old_BT, sampler_BT, mask_BT, level=level, cap=cap)
    assert not got_BT.requires_grad
    for b, length in enumerate(lengths):
        gaps = [(old_BT[b, t] - sampler_BT[b, t]).item() for t in range(length)]
        for t in range(6):
            want = min(math.exp(sum(gaps) if level == "sequence" else gaps[t]), cap) if t < length else 1.0
            assert got_BT[b, t].item() == pytest.approx(want, rel=1e-12)


def test_truncated_weights_are_finite_where_the_product_of_a_row_is_not() -> None:
    old_BT = torch.tensor([[900.0, 900.0], [-900.0, -900.0]])
    got = truncated_weights(old_BT, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), level="sequence", cap=2.0)
    assert got.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_truncated_weights_refuse_what_they_cannot_mean() -> None:
    a, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="level"):
        truncated_weights(a, a, mask, level="row", cap=2.0)
    with pytest.raises(ValueError, match="shape"):
        truncated_weights(a, a[:, :1], mask, level="token", cap=2.0)
    with pytest.raises(ValueError, match="cap"):
        truncated_weights(a, a, mask, level="token", cap=0.0)


# ---------------------------------------------------------------- KL
@given(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=9))
@FEW
def test_k3_equals_a_loop_is_never_negative_and_pulls_towards_the_reference(pairs: list[tuple[float, float]]) -> None:
    logps = torch.tensor([logp for logp, _ in pairs], dtype=F64, requires_grad=True)
    ref = torch.tensor([ref for _, ref in pairs], dtype=F64, requires_grad=True)
    loss = k3(logps, ref)
    (grad, none) = torch.autograd.grad(loss.sum(), (logps, ref), allow_unused=True)
    assert none is None
    for t, (logp, r) in enumerate(pairs):
        assert loss[t].item() == pytest.approx(math.exp(r - logp) - (r - logp) - 1, abs=1e-9)
        assert loss[t].item() >= 0
        assert grad[t].item() == pytest.approx(1 - math.exp(r - logp), abs=1e-9)


def test_k3_is_the_kl_on_average_over_what_the_policy_samples() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=F64), torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_k3_stays_finite_far_away_and_refuses_other_shapes() -> None:
    logps = torch.tensor([-900.0, 0.0], requires_grad=True)
    loss = k3(logps, torch.tensor([0.0, -900.0]))
    assert torch.isfinite(loss).all()
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert grad.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="shape"):
        k3(torch.zeros(2, 3), torch.zeros(3))


# ---------------------------------------------------------------- alignment
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, 255))
@FEW
def test_a_response_without_a_reward_is_in_no_pair(seed: int, right: int, bits: int) -> None:
    logps, ref, rewards = group(8, right, seed)
    out = torch.tensor([bool(bits >> i & 1) for i in range(8)])
    holed = torch.where(out, math.nan, rewards)
    loss = group_alignment(logps, ref, holed, beta=0.7)
    want = group_alignment(logps[~out], ref[~out], rewards[~out], beta=0.7)
    torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, logps)
    (alone,) = torch.autograd.grad(want, logps)
    torch.testing.assert_close(grad, alone)
    torch.testing.assert_close(pair_coefficients(logps, ref, holed, beta=0.7), -grad.detach())


@pytest.mark.parametrize("right", range(9))
@pytest.mark.parametrize("reference", [True, False])
def test_group_alignment_equals_a_loop_over_pairs(right: int, reference: bool) -> None:
    logps, ref, rewards = group(8, right)
    terms = []
    for s in range(8):
        for f in range(8):
            if rewards[s] > rewards[f]:
                d = logps[s].item() - logps[f].item() - (ref[s].item() - ref[f].item() if reference else 0.0)
                terms.append(math.log(1 + math.exp(-0.7 * d)))
    got = group_alignment(logps, ref if reference else None, rewards, beta=0.7)
    assert got.item() == pytest.approx(sum(terms) / len(terms) if terms else 0.0, rel=1e-12)


def pair_coefficients(logps: torch.Tensor, ref: torch.Tensor | None, rewards: torch.Tensor, *, beta: float) -> torch.Tensor:
    """ALGORITHMS 7.4's closed form, pair by pair: c_i = -dGAL/ds_i, for binary rewards; NaN is in no pair."""
    gain = logps.detach() if ref is None else logps.detach() - ref
    pairs = [(i, j) for i in range(len(gain)) for j in range(len(gain)) if rewards[i] > rewards[j]]
    c = torch.zeros_like(gain)
    for i, j in pairs:
        pull = beta * torch.sigmoid(-beta * (gain[i] - gain[j])) / len(pairs)
        c[i] += pull
        c[j] -= pull
    return c


@pytest.mark.parametrize("right", range(1, 8))
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_two_pass_coefficients_give_the_gradient_of_the_pair_mean(right: int, reference: bool, mean: bool) -> None:
    torch.manual_seed(right)
    mask_KT = torch.arange(6) < torch.randint(1, 7, (8, 1))
    logps_KT, ref_KT = -2 * torch.rand(8, 6, dtype=F64), -2 * torch.rand(8, 6, dtype=F64)
    logps_KT.requires_grad_()
    rewards = torch.randperm(8) < right

    def reduced(x_KT: torch.Tensor) -> torch.Tensor:
        return (x_KT * mask_KT).sum(-1) / (mask_KT.sum(-1) if mean else 1)

    ref = reduced(ref_KT) if reference else None
    (one_pass,) = torch.autograd.grad(group_alignment(reduced(logps_KT), ref, rewards, beta=0.5), logps_KT)
    coefficients = pair_coefficients(reduced(logps_KT), ref, rewards, beta=0.5)
    assert coefficients.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(coefficients > 0, rewards)
    (two_pass,) = torch.autograd.grad(-(coefficients * reduced(logps_KT)).sum(), logps_KT)
    torch.testing.assert_close(two_pass, one_pass, rtol=1e-12, atol=1e-15)
    assert one_pass.abs().sum() > 0.01


def test_alignment_orders_shaped_rewards_pair_by_pair() -> None:
    logps, rewards = torch.tensor([-1.0, -2.0, -4.0], dtype=F64), torch.tensor([1.0, 0.5, 0.0])
    want = [math.log(1 + math.exp(-d)) for d in (1.0, 3.0, 2.0)]
    assert group_alignment(logps, None, rewards, beta=1.0).item() == pytest.approx(sum(want) / 3)


@given(st.integers(1, 7), st.integers(0, 10_000))
@FEW
def test_alignment_does_not_see_the_order_within_a_group(right: int, seed: int) -> None:
    logps, ref, rewards = group(8, right, seed)
    order = torch.randperm(8)
    a = group_alignment(logps, ref, rewards, beta=1.0)
    b = group_alignment(logps[order], ref[order], rewards[order], beta=1.0)
    torch.testing.assert_close(a, b)


def test_swapping_the_labels_turns_every_margin_round() -> None:
    logps, ref, rewards = group(6, 2)
    d = pair_margins(logps, ref, rewards, beta=1.0).sort().values
    swapped = pair_margins(logps, ref, 1 - rewards, beta=1.0)
    torch.testing.assert_close(swapped.neg().sort().values, d)


def test_alignment_has_a_gradient_that_finite_differences_confirm() -> None:
    """Regression for the official first release (99d3476), where GAL was a constant."""
    logps, ref, rewards = group(8, 3)
    loss = group_alignment(logps, ref, rewards, beta=1.0)
    assert loss.requires_grad
    (grad,) = torch.autograd.grad(loss, logps)
    assert grad.abs().min() > 1e-3
    for i in range(8):
        nudge = torch.zeros(8, dtype=F64)
        nudge[i] = 1e-6
        up = group_alignment(logps.detach() + nudge, ref, rewards, beta=1.0)
        down = group_alignment(logps.detach() - nudge, ref, rewards, beta=1.0)
        assert grad[i].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-5)


def test_alignment_survives_margins_that_overflow_a_naive_sigmoid() -> None:
    logps = torch.tensor([-5000.0, -1.0], requires_grad=True)
    loss = group_alignment(logps, None, torch.tensor([1.0, 0.0]), beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(4999.0)
    assert logps.grad is not None
    assert logps.grad.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("right", range(1, 8))
def test_on_policy_grpo_dr_grpo_and_alignment_differ_only_by_a_scalar(right: int) -> None:
    """ALGORITHMS section 1: all are D = mean over right - mean over wrong, times a known number."""
    k, p, beta = 8, right / 8, 0.6
    torch.manual_seed(right)
    rewards = (torch.randperm(k) < right).to(F64)
    logps = -torch.rand(k, dtype=F64)
    direction = rewards / right - (1 - rewards) / (k - right)

    def ascent(loss_of: object, scale: str = "") -> torch.Tensor:
        x = logps.clone().requires_grad_()
        if scale:
            advantages = grpo_advantages(rewards, scale=scale, eps=0.0)
            loss = clipped_surrogate(x, logps, advantages, clip_low=0.2, clip_high=0.2).mean()
        else:
            loss = group_alignment(x, logps, rewards, beta=beta)
        return -torch.autograd.grad(loss, x)[0]

    unbiased = math.sqrt((k - 1) / k)
    torch.testing.assert_close(ascent("grpo", "std"), math.sqrt(p * (1 - p)) * unbiased * direction)
    torch.testing.assert_close(ascent("dr", "none"), p * (1 - p) * direction)
    torch.testing.assert_close(ascent("gal"), beta / 2 * direction)


# ---------------------------------------------------------------- supervised
@given(st.integers(0, 10_000))
@FEW
def test_sft_equals_a_loop_and_ignores_what_is_masked(seed: int) -> None:
    torch.manual_seed(seed)
    logps_BT, mask_BT = -torch.rand(3, 4, dtype=F64), torch.rand(3, 4) < 0.5
    want = -sum(logps_BT[b, t].item() for b in range(3) for t in range(4) if mask_BT[b, t])
    poisoned_BT = torch.where(mask_BT, logps_BT, -torch.inf).requires_grad_()
    loss = sft(poisoned_BT, mask_BT)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(poisoned_BT.grad, -mask_BT.to(F64))


def test_empty_things_give_zero_with_a_zero_gradient_and_never_nan() -> None:
    logps = torch.full((3,), -1.0, requires_grad=True)
    for loss in (
        sft(logps, torch.zeros(3, dtype=torch.bool)),
        group_alignment(logps, None, torch.ones(3), beta=1.0),
        group_alignment(logps, logps, torch.zeros(3), beta=1.0),
        clipped_surrogate(logps, logps, grpo_advantages(torch.ones(3)), clip_low=0.2, clip_high=0.2).sum(),
    ):
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, logps)
        assert torch.equal(grad, torch.zeros(3))
    assert sft(torch.zeros(0), torch.zeros(0)).item() == 0.0


# ---------------------------------------------------------------- all
def test_gradcheck_in_float64() -> None:
    torch.manual_seed(1)
    old = 0.05 * torch.randn(6, dtype=F64)
    advantages = torch.randn(6, dtype=F64)
    logps = (old + 0.05 * torch.randn(6, dtype=F64)).requires_grad_()
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    for far in (0.0, 1.0):  # 1: past every clip, dual clip included
        clipped = partial(clipped_surrogate, old_logps=old - far, advantages=advantages, **clips, dual_clip=2.0)
        assert torch.autograd.gradcheck(clipped, logps)
        rows = partial(sequence_surrogate, mask_BT=mask_BT, advantages_B=advantages[:2], **clips, dual_clip=2.0)
        far_BT = (old - far).view(2, 3)
        assert torch.autograd.gradcheck(lambda x, f=rows, o=far_BT: f(x.view(2, 3), o).sum(-1), logps)
    for shift in (5.0, -5.0):  # where its weight is a bound: elsewhere cispo's weight is held constant by definition
        assert torch.autograd.gradcheck(lambda x, d=shift: cispo(x, old + d, advantages, **clips), logps)
    assert torch.autograd.gradcheck(lambda x: k3(x, old - 0.3), logps)
    assert torch.autograd.gradcheck(lambda x: sft(x, advantages > 0), logps)
    holed = torch.where(advantages > 1, math.nan, (advantages > 0).to(F64))
    for ref in (None, old):
        for rewards in (advantages > 0, holed):
            assert torch.autograd.gradcheck(lambda x, r=ref, w=rewards: group_alignment(x, r, w, beta=2.0), logps)
