"""Weights of a token or a row by what the policy thinks of it now. All are constants of the gradient.

    phi        p (1 - p)                    at most 1/4, at p = 1/2                       (CHORD-phi)
    entropy    scale * exp(sign * H)        H: mean entropy of the row's tokens           (SRFT)

Left out: what is weighed, and any mean.
"""

import torch
from torch import Tensor


def phi_weights(logps: Tensor) -> Tensor:
    """p (1 - p) of each token, detached. logps: any shape, nats. Source: CHORD (arXiv 2508.11408)."""
    p = logps.detach().exp()
    return p * (1 - p)


def entropy_weights(entropy_BT: Tensor, mask_BT: Tensor, *, scale: float, sign: int) -> Tensor:
    """[B, 1]: scale * exp(sign * H) of each row, H its mean entropy (nats) where the mask is; detached. Source: SRFT, section 4.

    A row with an empty mask has H = 0. Raises ValueError for a sign other than 1 and -1.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign is 1 or -1, found {sign}")
    mask_BT = mask_BT.bool()
    total_B1 = torch.where(mask_BT, entropy_BT.detach(), 0.0).sum(-1, keepdim=True)
    return scale * torch.exp(sign * total_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1))
