"""The clipped policy-gradient surrogate, by token or by sequence.

    token:     L_t = -min(r_t A, clip(r_t, 1 - low, 1 + high) A),   r_t = exp(l_t - old_t)          (PPO, GRPO)
    sequence:  the same with s = exp(mean_t (l_t - old_t)) for every token of the row               (GSPO)

One idea: the value is per token and not reduced, so that the caller's denominator is the only one. The log-ratio is
clamped to +-LOG_RATIO_LIMIT before exp, as in verl: beyond it the value is finite and the gradient is zero.
Left out: dual clip, truncation of the sampler's mismatch, KL terms.
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Per-token loss, to minimise. Source: DYPO Eq. 21 with the sampling policy in the ratio (docs/losses.md says why).

    logps: any shape, log-probs (nats) under the policy being trained. old_logps: the same shape, under the policy that
    sampled; taken as constant. advantages: broadcast to logps' shape by the usual rules; taken as constant.
    Returns logps' shape. Raises ValueError if the shapes do not fit or a clip bound is negative.
    """
    if old_logps.shape != logps.shape:
        raise ValueError(f"old_logps has shape {list(old_logps.shape)}, logps {list(logps.shape)}")
    ratio = torch.exp((logps - old_logps.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return _clipped(ratio, advantages, clip_low, clip_high)


def sequence_surrogate(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """GSPO's form: one ratio a row, spread so that each of its tokens gets the same gradient. To minimise.

    mask_BT: True at response tokens. Returns [B, T]; where the mask is False the value is 0 and so is the gradient.
    The forward value of each token of a row is the row's clipped term, so the mean over its tokens is that term.
    Source: GSPO as coded in verl (ALGORITHMS section 3.2). Raises ValueError as `clipped_surrogate`.
    """
    if not logps_BT.shape == old_logps_BT.shape == mask_BT.shape:
        raise ValueError(
            f"shapes differ: logps {list(logps_BT.shape)}, old_logps {list(old_logps_BT.shape)}, mask {list(mask_BT.shape)}"
        )
    mask_BT = mask_BT.bool()
    log_ratio_BT = torch.where(mask_BT, (logps_BT - old_logps_BT).detach(), 0.0)
    mean_B1 = log_ratio_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    straight_BT = logps_BT - logps_BT.detach()  # zero, with the gradient of one log-prob
    ratio_BT = torch.exp((mean_B1 + straight_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return torch.where(mask_BT, _clipped(ratio_BT, advantages_B.unsqueeze(-1), clip_low, clip_high), 0.0)


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip bounds are distances from 1, found low {clip_low} and high {clip_high}")
    try:
        advantages = advantages.detach().broadcast_to(ratio.shape)
    except RuntimeError:
        raise ValueError(f"advantages of shape {list(advantages.shape)} do not broadcast to {list(ratio.shape)}") from None
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
