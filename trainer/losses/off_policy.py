"""Traces as off-policy members of a group: their behaviour's probability is unknown and taken as 1, so that p is the ratio.

    shaped    L_t = -f(p_t) A,  f(p) = p / (p + g)        df / dl = g p / (p + g)^2: at most 1/4, at p = g        (LUFFY)
    plain     L_t = -p_t A                                                                                       (SRFT)

One idea: f(p) is the logistic function of l - log g, so a token of tiny probability costs no precision.
Left out: clipping (neither method clips these rows), and any mean.
"""

import math

import torch
from torch import Tensor


def off_policy_surrogate(logps: Tensor, advantages: Tensor, *, shaping: float | None) -> Tensor:
    """Per-token loss of a trace, to minimise. Source: LUFFY (arXiv 2504.14945, section 3); SRFT (arXiv 2506.19767, section 4).

    logps: any shape, log-probs (nats). advantages: broadcast to logps' shape; taken as constant. shaping: g above 0, or None: plain.
    Returns logps' shape. Raises ValueError if g is not above 0.
    """
    if shaping is None:
        return -logps.exp() * advantages.detach()
    if shaping <= 0:
        raise ValueError(f"shaping is g of f(p) = p / (p + g): expected above 0, found {shaping}")
    return -torch.sigmoid(logps - math.log(shaping)) * advantages.detach()
