"""The policy-gradient surrogates, by token or by sequence.

    clip       L_t = -min(r_t A, clip(r_t, 1 - low, 1 + high) A),   r_t = exp(l_t - old_t)          (PPO, GRPO)
               with a dual clip c, where A < 0: L_t is at most -c A, so r_t > c gives no gradient   (dual-clip PPO)
    sequence   the same with s = exp(mean_t (l_t - old_t)) for every token of the row               (GSPO)
    cispo      L_t = -sg(clip(r_t, 1 - low, 1 + high)) A l_t                                        (CISPO)
    unclipped  L_t = -r_t A                                                                         (LUFFY, HPT, ReLIFT)
    self       L_t = -w l_t where the row is right, +l_t where it is wrong                          (SRFT)

One idea: the value is per token and not reduced, so that the caller's denominator is the only one. The log-ratio is
clamped to +-LOG_RATIO_LIMIT before exp, as in verl: beyond it the value is finite and the gradient is zero (cispo's weight is
a constant anyway). Left out: the sampler's mismatch (truncation.py), KL (divergence.py), the mean (objective.py).
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def clipped_surrogate(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Per-token loss, to minimise. Source: DYPO Eq. 21 with the sampling policy in the ratio (docs/losses.md says why).

    logps: any shape, log-probs (nats) under the policy being trained. old_logps: the same shape, under the policy that
    sampled; taken as constant. advantages: broadcast to logps' shape by the usual rules; taken as constant.
    clip_low 1 clips no small ratio; dual_clip None: none.
    Returns logps' shape. Raises ValueError if the shapes do not fit or a clip bound has no meaning.
    """
    return _clipped(_ratio(logps, old_logps), advantages, clip_low, clip_high, dual_clip)


def sequence_surrogate(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
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
    return torch.where(mask_BT, _clipped(ratio_BT, advantages_B.unsqueeze(-1), clip_low, clip_high, dual_clip), 0.0)


def cispo(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Per-token REINFORCE weighted by the clipped ratio, to minimise: clipping bounds a token's weight and never its gradient
    away. Its value is not near 0 on-policy. Arguments, shapes and errors as in `clipped_surrogate`.

    Source: CISPO (MiniMax-M1). TRL's form has only an upper bound, of 5: clip_low = 1, clip_high = 4.
    """
    with torch.no_grad():
        ratio = _ratio(logps, old_logps)
        weight = ratio.clamp(*_bounds(clip_low, clip_high)) * _spread(advantages, ratio)
    return -weight * logps


def unclipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """Per-token -r A, to minimise; no bound on the ratio but the clamp. Arguments, shapes and errors as in `clipped_surrogate`.

    Source: LUFFY, HPT and ReLIFT as coded (`loss_remove_clip`; ALGORITHMS sections 3.4 to 3.6).
    """
    ratio = _ratio(logps, old_logps)
    return -ratio * _spread(advantages, ratio)


def self_surrogate(logps: Tensor, correct: Tensor, weights: Tensor) -> Tensor:
    """Per-token -w l of a right rollout, +l of a wrong one, to minimise. Source: SRFT's self-rollout term (arXiv 2506.19767, section 4).

    correct, weights: broadcast to logps' shape; taken as constant. The value of wrong rollouts has no lower bound.
    """
    right = correct.bool().broadcast_to(logps.shape)
    return torch.where(right, -weights.detach() * logps, logps)


def _ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    if old_logps.shape != logps.shape:
        raise ValueError(f"old_logps has shape {list(old_logps.shape)}, logps {list(logps.shape)}")
    return torch.exp((logps - old_logps.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None) -> Tensor:
    low, high = _bounds(clip_low, clip_high)
    advantages = _spread(advantages, ratio)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is None:
        return loss
    if dual_clip <= 1:
        raise ValueError(f"dual_clip bounds a ratio from above, where 1 is on-policy: expected above 1, found {dual_clip}")
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def _bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(f"clip bounds are distances from 1, low at most 1: found low {clip_low} and high {clip_high}")
    return 1 - clip_low, 1 + clip_high


def _spread(advantages: Tensor, ratio: Tensor) -> Tensor:
    try:
        return advantages.detach().broadcast_to(ratio.shape)
    except RuntimeError:
        raise ValueError(f"advantages of shape {list(advantages.shape)} do not broadcast to {list(ratio.shape)}") from None
