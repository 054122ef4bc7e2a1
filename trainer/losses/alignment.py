"""Group Alignment Loss (GAL): within a group, right responses should gain on wrong ones.

    d_ij = beta * [(s_i - ref_i) - (s_j - ref_j)]        for every pair with R_i > R_j, M of them
    L    = (1 / M) sum_pairs -log sigmoid(d_ij)          (DYPO Eq. 14-15, 23)
    flat = (1 / M) sum_pairs -d_ij / 2                   every sigmoid taken as 1/2: a constant weight a group

One idea: the loss of a whole group needs all its sequence log-probs, and only them, so it never meets the model; how a
group that does not fit one forward gets the same gradient in two passes is the affair of step.py.
Left out: how s is reduced from tokens (sum or mean), which is the caller's choice, and sub-sampling of pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_alignment(logps: Tensor, ref_logps: Tensor | None, rewards: Tensor, *, beta: float) -> Tensor:
    """Mean of -log sigmoid(d) over the group's pairs R(s) > R(f); 0 (with a zero gradient) without pairs.

    logps: [k] reduced sequence log-probs (nats) under the policy. ref_logps: [k] the same reduction under the reference,
    taken as constant, or None: reference-free. rewards: [k], bool, int or float; NaN: this response is in no pair.
    Returns a scalar, to minimise. Raises ValueError if the shapes differ or are not [k].
    """
    d_M = pair_margins(logps, ref_logps, rewards, beta=beta)
    return -F.logsigmoid(d_M).mean() if len(d_M) else logps[:0].sum()


def flat_alignment(logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """Mean of -d / 2 over the group's pairs: GAL's gradient where all sigmoids are 1/2, so without the pairs' own weights.

    It is beta / 2 times the difference of means, whatever the reference. Arguments and errors as in `group_alignment`.
    Source: the control of ALGORITHMS 7.3 row 20.
    """
    d_M = pair_margins(logps, None, rewards, beta=beta)
    return -d_M.mean() / 2 if len(d_M) else logps[:0].sum()


def pair_margins(logps: Tensor, ref_logps: Tensor | None, rewards: Tensor, *, beta: float) -> Tensor:
    """d of every pair, [M], in row-major order of (right, wrong). Arguments as in `group_alignment`."""
    better_KK = _better(logps, ref_logps, rewards)
    gain_K = logps if ref_logps is None else logps - ref_logps.detach()
    return beta * (gain_K.unsqueeze(1) - gain_K.unsqueeze(0))[better_KK]


def _better(logps: Tensor, ref_logps: Tensor | None, rewards: Tensor) -> Tensor:
    """[k, k], True where R_i > R_j."""
    rewards = torch.as_tensor(rewards, device=logps.device)
    for name, given in (("logps", logps), ("ref_logps", ref_logps), ("rewards", rewards)):
        if given is not None and (given.ndim != 1 or len(given) != len(rewards)):
            raise ValueError(f"a group of {len(rewards)} has {name} of shape [k], found {list(given.shape)}")
    rewards_K = rewards.to(torch.float64)
    return rewards_K.unsqueeze(1) > rewards_K.unsqueeze(0)
