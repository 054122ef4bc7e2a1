"""Truncated importance sampling: what a token's loss is worth when another program than the trainer sampled it.

    token      w_t = min(exp(old_t - sampler_t), C)
    sequence   w_t = min(exp(sum_t (old_t - sampler_t)), C) for every token of the row

where old is the trainer's own log-prob under the policy that sampled and sampler the sampling program's. One idea: both are
stored, so the weight is a constant of the shard and no gradient can pass. Left out: what the weight multiplies.
"""

import math

import torch
from torch import Tensor


def truncated_weights(old_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, *, level: str, cap: float) -> Tensor:
    """Weights [B, T] between 0 and `cap`, without gradient; 1 where the mask is False. Source: TIS as in verl.

    All [B, T]; log-probs in nats, mask True at response tokens. level: "token" or "sequence".
    Raises ValueError for another level, shapes that differ, or a cap that is not above 0.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is 'token' or 'sequence', found {level!r}")
    if not old_logps_BT.shape == sampler_logps_BT.shape == mask_BT.shape:
        found = [list(x.shape) for x in (old_logps_BT, sampler_logps_BT, mask_BT)]
        raise ValueError(f"old_logps, sampler_logps and mask differ in shape: {found}")
    if cap <= 0:
        raise ValueError(f"cap bounds a weight from above: expected above 0, found {cap}")
    with torch.no_grad():
        gap_BT = torch.where(mask_BT.bool(), old_logps_BT - sampler_logps_BT, 0.0)
        if level == "sequence":
            gap_BT = gap_BT.sum(-1, keepdim=True).expand_as(gap_BT)
        return torch.where(mask_BT.bool(), gap_BT.clamp(max=math.log(cap)).exp(), 1.0)
