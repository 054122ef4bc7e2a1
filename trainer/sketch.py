"""A linear sketch of gradients: many numbers folded into D, inner products kept on average.

    S(g)_b = sum over coordinates i with bucket(i) = b of sign(i) g_i        (CountSketch; one non-zero a column)

One idea: bucket and sign are a hash of (seed, i), computed where they are needed, so no projection is stored and all
gradients of a run share one. S is linear: the sketch of a mean or a mixture is the mean or mixture of sketches. Over
seeds E <S(x), S(y)> = <x, y>, with variance at most (|x|^2 |y|^2 + <x, y>^2) / D. A model with no more than D
parameters is not sketched: S is the identity. Left out: anything about what the gradients are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.ids import seed_from

CHUNK = 1 << 22  # coordinates hashed at a time: bounds the memory beside the gradient


class Sketch:
    """The map from gradients of `parameters` numbers in all to `width` <= `dimension` numbers."""

    def __init__(self, parameters: int, dimension: int, *, seed: int) -> None:
        self.exact = parameters <= dimension
        self.width = parameters if self.exact else dimension
        self._key = seed_from("sketch", seed)
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = {} if parameters <= CHUNK else None

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """[width], float64, of a gradient given as tensors (one a parameter, always in the same order), on their device."""
        if self.exact:
            return torch.cat([g.detach().double().flatten() for g in grads])
        out_D = torch.zeros(self.width, dtype=torch.float64, device=grads[0].device)
        offset = 0
        for grad in grads:
            for part in grad.detach().flatten().split(CHUNK):
                bucket, sign = self._places(offset, len(part), part.device)
                out_D.index_add_(0, bucket, part.double() * sign)
                offset += len(part)
        return out_D

    def _places(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`places`, remembered for a small model, where hashing would cost more than its backward."""
        if self._known is None:
            return self.places(start, length, device)
        if (start, length) not in self._known:
            self._known[start, length] = self.places(start, length, device)
        return self._known[start, length]

    def places(self, start: int, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Bucket and sign of coordinates start .. start + length - 1."""
        at = torch.arange(start, start + length, dtype=torch.int64, device=device)
        hashed = _mixed(at * -0x61C8864680B583EB + self._key)  # splitmix64: a counter times 2^64 / golden ratio, mixed
        return _shifted(hashed, 1) % self.width, 1 - 2 * (hashed & 1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on 64-bit integers that wrap around."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
