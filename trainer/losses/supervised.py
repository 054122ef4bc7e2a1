"""Supervised fine-tuning on a teacher's tokens: L = sum over response tokens of -log p (DYPO Eq. 2).

One idea: it is a sum. The mean is taken over the whole optimizer step by whoever knows its token count, never here.
Left out: label smoothing, weights (scale logps to weigh tokens).
"""

import torch
from torch import Tensor


def sft(logps: Tensor, mask: Tensor) -> Tensor:
    """Sum of -logps where mask; 0 (with a zero gradient) if the mask is empty.

    logps: any shape, log-probs in nats. mask: the same shape, bool or 0/1. Returns a scalar, to minimise.
    Values outside the mask never matter, not even infinite ones. Raises ValueError if the shapes differ.
    """
    if mask.shape != logps.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, logps {list(logps.shape)}")
    return -torch.where(mask.bool(), logps, 0.0).sum()
