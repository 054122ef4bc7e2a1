"""KL from the policy being trained to a reference, estimated on one sampled token.

    k3_t = exp(ref_t - l_t) - (ref_t - l_t) - 1          never negative, 0 where the two agree

One idea: it is a loss like any other, differentiated as it stands (dk3/dl = 1 - exp(ref - l)), so a gradient check confirms it.
As an estimate of a gradient it is exact only on-policy. Left out: the mean and the coefficient.
"""

from torch import Tensor

from trainer.losses.surrogate import LOG_RATIO_LIMIT


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token k3 (nats), to minimise. Source: Schulman's k3 as in GRPO; verl, TRL.

    logps: any shape, under the policy being trained. ref_logps: the same shape, under the reference; taken as constant.
    Where ref - logp is past LOG_RATIO_LIMIT the value stays finite and the gradient is zero. ValueError if the shapes differ.
    """
    if ref_logps.shape != logps.shape:
        raise ValueError(f"ref_logps has shape {list(ref_logps.shape)}, logps {list(logps.shape)}")
    gap = (ref_logps.detach() - logps).clamp(max=LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1
