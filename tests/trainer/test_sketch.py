"""The sketch is linear, keeps inner products on average, is a function of its seed, and is the identity when it can be."""

import numpy as np
import pytest
import torch

from trainer import sketch as module
from trainer.sketch import Sketch

N, D, SEEDS = 600, 64, 1500


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal(N) * np.exp(rng.standard_normal(N)))  # a few large numbers among many small ones
    return x, x * 0.6 + torch.tensor(rng.standard_normal(N))


def by_loop(sketch: Sketch, x: torch.Tensor) -> list[float]:
    out = [0.0] * sketch.width
    for i in range(len(x)):
        bucket, sign = sketch.places(i, 1)
        out[int(bucket)] += int(sign) * float(x[i])
    return out


def test_a_sketch_adds_every_coordinate_with_its_sign_to_its_bucket() -> None:
    x, _ = vectors()
    sketch = Sketch(N, D, seed=3)
    assert sketch([x]).tolist() == pytest.approx(by_loop(sketch, x), abs=1e-12)


def test_how_a_gradient_is_cut_into_tensors_and_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = vectors()
    whole = Sketch(N, D, seed=3)([x])
    monkeypatch.setattr(module, "CHUNK", 7)  # and so nothing is remembered between gradients
    cut = Sketch(N, D, seed=3)
    for _ in range(2):
        torch.testing.assert_close(cut([x[:100].reshape(10, 10), x[100:101], x[101:]]), whole, rtol=0, atol=1e-12)


def test_the_sketch_of_a_mixture_is_the_mixture_of_sketches() -> None:
    x, y = vectors()
    sketch = Sketch(N, D, seed=3)
    torch.testing.assert_close(sketch([0.3 * x - 2 * y]), 0.3 * sketch([x]) - 2 * sketch([y]), rtol=0, atol=1e-10)


def test_inner_products_are_kept_on_average_and_their_variance_is_the_stated_one() -> None:
    x, y = vectors()
    found = np.array([float(s([x]) @ s([y])) for s in (Sketch(N, D, seed=seed) for seed in range(SEEDS))])
    exact = float(x @ y)
    bound = float((x @ x) * (y @ y) + (x @ y) ** 2) / D
    assert abs(found.mean() - exact) < 4 * found.std() / SEEDS**0.5
    squares = x**2
    variance = (float(squares.sum() * (y**2).sum() - squares @ y**2) + exact**2 - float(squares @ y**2)) / D
    assert 0.8 * variance < found.var() < 1.2 * variance <= 1.2 * bound


def test_buckets_are_uniform_signs_are_fair_and_neither_follows_the_other() -> None:
    bucket, sign = Sketch(10**6, 100, seed=1).places(0, 200_000)
    counts = torch.bincount(bucket, minlength=100).double()
    assert len(counts) == 100
    assert 60 < float(((counts - 2000) ** 2 / 2000).sum()) < 145  # chi-square with 99 degrees of freedom: 99 +- 14
    assert set(sign.tolist()) == {-1, 1}
    per_bucket = torch.zeros(100, dtype=torch.float64).index_add_(0, bucket, sign.double())
    assert 60 < float((per_bucket**2 / counts).sum()) < 145
    assert abs(float((sign[1:] * sign[:-1]).double().mean())) < 4 / 200_000**0.5


def test_seeds_give_other_sketches_and_the_same_seed_the_same() -> None:
    x, _ = vectors()
    first, again, other = (Sketch(N, D, seed=seed)([x]) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_model_of_no_more_parameters_than_the_width_is_not_sketched() -> None:
    x, y = vectors()
    for width in (N, N + 1):
        sketch = Sketch(N, width, seed=0)
        assert sketch.exact
        assert sketch.width == N
        assert sketch([x[:8], x[8:]]).equal(x)
        assert float(sketch([x]) @ sketch([y])) == float(x @ y)
    assert not Sketch(N, N - 1, seed=0).exact
