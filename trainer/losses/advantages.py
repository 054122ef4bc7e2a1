"""How much better a rollout was than its group.

    A_i = (R_i - mean R) / (std R + eps)     scale "std": GRPO, std over k - 1
    A_i =  R_i - mean R                      scale "none": Dr.GRPO

One idea: a group without contrast has nothing to say, so equal rewards give exact zeros, whatever rounding the mean
suffers. Left out: anything across groups; groups never see each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def grpo_advantages(rewards: Tensor | Sequence[float], *, scale: str = "std", eps: float = 1e-6) -> Tensor:
    """Advantages of one group. Source: GRPO as coded in verl; DYPO Eq. 22.

    rewards: [k], bool, int or float, in the verifier's units. Returns [k]: float64 for float64 rewards, else float32;
    zeros when all rewards are equal or k = 1. Computed in float64.
    Raises ValueError for a scale other than "std" or "none", for rewards that are not one-dimensional or not finite.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is 'std' or 'none', found {scale!r}")
    given = torch.as_tensor(rewards)
    if given.ndim != 1:
        raise ValueError(f"one group has rewards of shape [k], found {list(given.shape)}")
    rewards_K = given.to(torch.float64)
    if not bool(torch.isfinite(rewards_K).all()):
        raise ValueError(f"rewards must be finite, found {given.tolist()}")
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    if len(rewards_K) < 2 or bool((rewards_K == rewards_K[0]).all()):
        return torch.zeros_like(rewards_K, dtype=dtype)
    centred_K = rewards_K - rewards_K.mean()
    if scale == "std":
        centred_K = centred_K / (rewards_K.std(correction=1) + eps)
    return centred_K.to(dtype)
