"""token_logps against a loop over tokens in plain autograd: values, gradients, tiles, dtypes, and what it never allocates."""

from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.bench.vocabulary import child, naive
from trainer import vocabulary
from trainer.vocabulary import token_logps

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def one_by_one(
    hidden_UH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, position_N: Tensor, target_N: Tensor, temperature_U: Tensor
) -> tuple[Tensor, Tensor]:
    """The dumbest version: one token, all its logits, at a time."""
    logps, entropies = [hidden_UH.new_zeros(0)], [hidden_UH.new_zeros(0)]
    for position, target in zip(position_N.tolist(), target_N.tolist(), strict=True):
        logits_V = torch.stack([hidden_UH[position] @ word_H for word_H in weight_VH])
        logits_V = (logits_V if bias_V is None else logits_V + bias_V) / temperature_U[position]
        all_V = logits_V.log_softmax(0)
        logps.append(all_V[target : target + 1])
        entropies.append(-(all_V.exp() * all_V).sum().reshape(1).detach())
    return torch.cat(logps), torch.cat(entropies)


def problem(
    positions: int = 5,
    words: int = 11,
    hidden: int = 3,
    tokens: int = 9,
    *,
    bias: bool = True,
    seed: int = 0,
    scale: float = 1.0,
) -> Arguments:
    """float64; several tokens a position in no order, temperatures 0.3 to 2.3."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=r, dtype=torch.float64)).requires_grad_()

    return (
        normal(positions, hidden),
        normal(words, hidden),
        normal(words) if bias else None,
        torch.randint(max(positions, 1), (tokens,), generator=r),
        torch.randint(words, (tokens,), generator=r),
        0.3 + 2 * torch.rand(positions, generator=r, dtype=torch.float64),
    )


def to(dtype: torch.dtype, arguments: Arguments) -> Arguments:
    hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U = arguments
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden_UH, weight_VH, bias_V)]
    return leaves[0], leaves[1], leaves[2], position_N, target_N, temperature_U  # pyright: ignore


def outcome(
    way: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments, **more: object
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(logps, entropy, gradients of hidden, weight, bias) for one upstream gradient a token."""
    leaves = [x for x in arguments[:3] if x is not None and x.requires_grad]
    logps_N, entropy_N = way(*arguments, **more)
    g_N = torch.linspace(-1, 2, len(logps_N), dtype=logps_N.dtype)
    return logps_N.detach(), entropy_N, list(torch.autograd.grad(logps_N, leaves, g_N))


def close(a: tuple[Tensor, Tensor, list[Tensor]], b: tuple[Tensor, Tensor, list[Tensor]], tolerance: float) -> None:
    """Everything within `tolerance` of the largest value of the tensor, or of 1 if that is larger."""
    for x, y in zip([*a[:2], *a[2]], [*b[:2], *b[2]], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max([1.0, *y.abs().flatten().tolist()]), check_dtype=False)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 14),
    st.booleans(),
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(1, 13),
)
def test_any_sizes_and_tiles_give_the_loops_values_and_gradients(
    positions: int, words: int, tokens: int, bias: bool, seed: int, tile_positions: int, tile_words: int
) -> None:
    arguments = problem(positions, words, 3, tokens, bias=bias, seed=seed, scale=3.0)
    want = outcome(naive if tokens == 0 else one_by_one, arguments)
    close(outcome(token_logps, arguments, tile=(tile_positions, tile_words)), want, 1e-10)
    close(outcome(token_logps, arguments), want, 1e-10)
    close(outcome(token_logps, to(torch.float32, arguments), tile=(tile_positions, tile_words)), want, 2e-5)


@pytest.mark.parametrize("tile", [None, (200, 512), (64, 100)])
def test_float32_agrees_with_float64_to_a_hundred_thousandth(tile: tuple[int, int] | None) -> None:
    arguments = problem(200, 512, 64, 400, scale=0.5)
    close(outcome(token_logps, to(torch.float32, arguments), tile=tile), outcome(naive, arguments), 1e-5)


@pytest.mark.parametrize("tile", [(5, 11), (5, 4), (2, 11), (2, 4)])
def test_gradcheck(tile: tuple[int, int]) -> None:
    hidden_UH, weight_VH, bias_V, *rest = problem()
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, b, *rest, tile=tile)[0],  # pyright: ignore
        (hidden_UH, weight_VH, bias_V),
    )


def test_the_entropy_carries_no_gradient_and_stays_finite_where_one_word_has_everything() -> None:
    arguments = problem(scale=60.0)
    logps_N, entropy_N = token_logps(*arguments, tile=(2, 3))
    assert not entropy_N.requires_grad
    assert logps_N.isfinite().all()
    assert entropy_N.isfinite().all()
    assert entropy_N.min() < 1e-6


def test_temperature_divides_the_logits() -> None:
    hidden_UH, weight_VH, _, position_N, target_N, temperature_U = problem(bias=False)
    cold = token_logps(hidden_UH, weight_VH, None, position_N, target_N, temperature_U)[0]
    scaled = token_logps(hidden_UH / temperature_U[:, None], weight_VH, None, position_N, target_N, torch.ones(5))[0]
    torch.testing.assert_close(cold, scaled)


@pytest.mark.parametrize("tile", [None, (2, 4)])
def test_no_tokens_give_empty_tensors_and_zero_gradients(tile: tuple[int, int] | None) -> None:
    for positions in (0, 5):
        logps_N, entropy_N, gradients = outcome(token_logps, problem(positions, tokens=0), tile=tile)
        assert logps_N.shape == entropy_N.shape == (0,)
        assert [g.abs().sum() for g in gradients] == [0, 0, 0]


@pytest.mark.parametrize("tile", [None, (2, 4)])
def test_a_second_backward_adds_the_same_gradient(tile: tuple[int, int] | None) -> None:
    arguments = problem()
    logps_N, _ = token_logps(*arguments, tile=tile)
    logps_N.square().sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in arguments[:3]]  # pyright: ignore
    logps_N.square().sum().backward()
    for x, g in zip(arguments[:3], once, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)  # pyright: ignore


@pytest.mark.parametrize("tile", [None, (2, 4)])
def test_gradient_checkpointing_changes_nothing(tile: tuple[int, int] | None) -> None:
    arguments = problem()

    def checkpointed(hidden_UH: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        def whole(h_UH: Tensor) -> tuple[Tensor, Tensor]:
            return token_logps(h_UH.tanh(), *rest, tile=tile)  # pyright: ignore

        return checkpoint(whole, hidden_UH, use_reentrant=False)  # pyright: ignore

    def plain(hidden_UH: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return naive(hidden_UH.tanh(), *rest)  # pyright: ignore

    close(outcome(checkpointed, arguments), outcome(plain, arguments), 1e-10)


def test_bfloat16_products_have_a_float32_log_sum_exp() -> None:
    arguments = to(torch.bfloat16, problem(40, 300, 64, 60, bias=False, scale=0.6))
    ours, want = outcome(token_logps, arguments), outcome(naive, arguments)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert [g.dtype for g in ours[2]] == [torch.bfloat16] * 2
    close((*ours[:2], []), (*want[:2], []), 1e-5)  # the same bfloat16 logits, so only their sum could differ
    close(ours, want, 2e-2)
    close(outcome(token_logps, arguments, tile=(16, 70)), want, 2e-2)


@pytest.mark.parametrize("tile", [None, (16, 70)])
def test_autocast_makes_bfloat16_products_and_float32_gradients(tile: tuple[int, int] | None) -> None:
    arguments = to(torch.float32, problem(40, 300, 64, 60, scale=0.6))
    exact = outcome(token_logps, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours, want = outcome(token_logps, arguments, tile=tile), outcome(naive, arguments)
    assert {x.dtype for x in (*ours[:2], *ours[2])} == {torch.float32}
    assert (ours[0] - exact[0]).abs().max() > 1e-4  # the products did happen in bfloat16
    close(ours, want, 2e-2)


class Sizes(TorchDispatchMode):
    """Collects the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_no_logits_of_all_tokens_and_no_gradient_of_a_frozen_head_are_made(frozen: bool) -> None:
    arguments = to(torch.float32, problem(100, 200, 7, 120))
    arguments[1].requires_grad_(not frozen)
    arguments[2].requires_grad_(not frozen)  # pyright: ignore
    with Sizes() as seen:
        ours = outcome(token_logps, arguments, tile=(50, 40))
    close(ours, outcome(naive, arguments), 1e-4)
    assert (100, 7) in seen.shapes
    assert ((200, 7) in seen.shapes) == (not frozen)
    assert max(a * b for a, b, *_ in ((*s, 1, 1) for s in seen.shapes)) == 50 * 40


def test_logits_that_fit_one_tile_are_made_once_and_others_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    logits = vocabulary._Tiles.logits
    monkeypatch.setattr(vocabulary._Tiles, "logits", lambda self, *a: made.append(1) or logits(self, *a))
    outcome(token_logps, problem())
    assert len(made) == 1
    outcome(token_logps, problem(), tile=(5, 6))
    assert len(made) == 1 + 2 * 2


@pytest.mark.parametrize(("name", "at"), [("position_N", 3), ("target_N", 4)])
@pytest.mark.parametrize("wrong", [-100, 11])
def test_a_position_or_target_that_does_not_exist_is_refused(name: str, at: int, wrong: int) -> None:
    arguments = problem()
    arguments[at][2] = wrong
    with pytest.raises(ValueError, match=rf"{name}: values from .*{wrong}.*, expected 0 to"):
        token_logps(*arguments, tile=(2, 4))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_fresh_process_needs_less_than_half_of_the_logits_it_went_through() -> None:
    logits_mb = 2048 * 32_000 * 4 / 1e6
    assert child("peak(token_logps, (2048, 32_000, 64))")["beyond_weight_grad_mb"] < 0.5 * logits_mb
