"""The mixture of one optimizer update, as weights and as the value of a micro-batch.

    L = sft SFT + grpo PG + gal GAL        weights of the method (schemas/methods/), each times a share of the step:
        normalise = gated    n_hard / n for SFT, n_mid / n for PG and GAL (DYPO Eq. 4); all: these times gated / (gated + easy)
        normalise = own      1 where the step has rows of the component
    SFT   sum over supervised traces of w_sft / N * sum_t c_t (-logp_t)     N = supervised tokens of the update ("token")
          or w_sft / (n_hard T_i) ("prompt");  c_t: 1, or the method's weight of a token
    PG    sum over rollouts of w_grpo * share_i * sum_t (weight_t surrogate_t + kl k3_t), and over traces that are members of a
          group of w_grpo * share_i * sum_t off-policy surrogate_t
          share_i = 1 / (n_mid k T_i) (seq-mean-token-mean), 1 / tokens of PG (token-mean), 1 / (n_mid k horizon) (the last)
          k counts the members of the group: its rollouts, and the trace if it is one of them
    GAL   sum over groups of w_gal / n_mid * mean over pairs (correct against not correct, or R(s) > R(f))

One idea: every denominator is counted from the rows of the whole update before the first forward (`count`), and becomes
a share of a row or group (`Share`). A micro-batch then only sums, so how an update is split cannot change its gradient.
Rows of weight 0 count in the denominators: a weight scales its row and gives nothing to the others. So do masked rows (cut at
max_tokens, if the recipe says so): they have no share of PG and are in no pair of GAL; and groups without contrast, which
`silent` tells, so that nobody has to run them.
Left out: the model, autograd, metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.methods import GAL, GRPO, Loss, Weights
from trainer.batch import padded
from trainer.losses import (
    cispo,
    clipped_surrogate,
    entropy_weights,
    flat_alignment,
    group_alignment,
    k3,
    off_policy_surrogate,
    phi_weights,
    self_surrogate,
    sequence_surrogate,
    sft,
    truncated_weights,
    unclipped_surrogate,
)
from trainer.rows import Row

Unit = list[Row]  # one sft row, or one whole group
SRFT_TRACE, SRFT_ROLLOUT = 0.5, 0.1  # SRFT's scales of its two entropy weights (section 4)


@dataclass(frozen=True)
class Counts:
    """What an update is divided by. prompts is n; hard and mid are n_hard and n_mid, the traces and the groups in it.

    sft_tokens, rl_tokens: of traces, of rollouts. member_tokens: of the traces that are members of a group. pairs: those that
    GAL forms.
    """

    prompts: int
    hard: int
    mid: int
    rows: int
    sft_tokens: int
    rl_tokens: int
    pairs: int
    member_tokens: int = 0


@dataclass(frozen=True)
class Mixture:
    """L = sft * SFT + grpo * GRPO + gal * GAL."""

    sft: float
    grpo: float
    gal: float


@dataclass(frozen=True)
class MicroBatch:
    """Some units of an update as tensors: shard columns, and each row's or group's share of its component's mean.

    rl rows come first, group by group: group g is rows starts[g]:starts[g + 1]. Columns that a row has no use for are 0.
    old_BT: what ratios divide by. sampler_BT: what truncation weighs against (None: no truncation). ref_BT: GAL's reference
    (None: it has none). base_BT: the KL's (None: no KL). teacher_BT: the distillation's (None: no distillation). rating_B: what
    GAL's pairs compare (`Row.rating`). off_policy_B: traces that are members of a group.
    """

    rows: list[Row]
    mask_BT: Tensor
    starts: list[int]
    old_BT: Tensor
    sampler_BT: Tensor | None
    ref_BT: Tensor | None
    base_BT: Tensor | None
    teacher_BT: Tensor | None
    advantage_B: Tensor
    rating_B: Tensor
    correct_B: Tensor
    off_policy_B: Tensor
    sft_share_B: Tensor
    grpo_share_B: Tensor
    gal_share_G: list[float]

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(-1)


@dataclass(frozen=True)
class Components:
    """A micro-batch's part of each component's mean: unweighted by the mixture, so that they add up over an update."""

    sft: Tensor
    grpo: Tensor
    gal: Tensor


def count(units: Sequence[Unit], prompts: int) -> Counts:
    """The denominators of one update over `units`, drawn by `prompts` prompt visits."""
    hard = [unit for unit in units if unit[0].route == "sft"]
    mid = [unit for unit in units if unit[0].route == "rl"]
    return Counts(
        prompts=prompts,
        hard=len(hard),
        mid=len(mid),
        rows=sum(len(unit) for unit in units),
        sft_tokens=sum(len(row.tokens) for unit in hard for row in unit),
        rl_tokens=sum(len(row.tokens) for unit in mid for row in unit),
        pairs=sum(s.rating > f.rating for unit in mid for s in unit for f in unit),
        member_tokens=sum(len(row.tokens) for unit in hard for row in unit if row.member),
    )


def silent(unit: Unit, loss: Loss) -> bool:
    """Whether a unit gives exactly no gradient, so that it need not run: a group without contrast, a trace that weighs nothing."""
    if unit[0].route == "sft":
        return all(row.w_sft == 0 and (row.w_grpo == 0 or row.advantage == 0) for row in unit)
    if loss.rollout_term != "surrogate" or loss.grpo.kl > 0:
        return False
    contrast = any(row.w_grpo != 0 and row.advantage != 0 for row in unit)
    pairs = loss.gal is not None and any(s.rating > f.rating for s in unit for f in unit)
    return not contrast and not pairs


def mixture(weights: Weights, loss: Loss, counts: Counts, *, easy_scale: float = 1.0) -> Mixture:
    """The method's weights, each times its component's share. easy_scale: gated / (gated + easy) of the round where loss.normalise
    is all, else 1."""
    if loss.normalise == "own":
        hard, mid = float(counts.hard > 0), float(counts.mid > 0)
    else:
        hard, mid = easy_scale * counts.hard / counts.prompts, easy_scale * counts.mid / counts.prompts
    return Mixture(sft=hard * weights.sft, grpo=mid * weights.grpo, gal=mid * weights.gal)


def micro_batch(units: Sequence[Unit], counts: Counts, loss: Loss, device: str = "cpu") -> MicroBatch:
    """The tensors of some units of an update whose denominators are `counts`."""
    groups = [unit for unit in units if unit[0].route == "rl"]
    rows = [row for unit in groups for row in unit] + [row for u in units if u[0].route == "sft" for row in u]
    starts = np.cumsum([0, *(len(unit) for unit in groups)]).tolist()
    sft_share, grpo_share = [], []
    for row in rows:
        hard_denominator = counts.sft_tokens if loss.sft_reduction == "token" else counts.hard * len(row.tokens)
        sft_share.append(row.w_sft / hard_denominator if row.route == "sft" else 0.0)
        shares = not row.masked and (row.route == "rl" or row.member)
        grpo_share.append(row.w_grpo / _denominator(row, counts, loss.grpo) if shares else 0.0)

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def by_token(arrays: list[np.ndarray | None]) -> Tensor:
        filled = [np.zeros(len(r.tokens)) if a is None else a for r, a in zip(rows, arrays, strict=True)]
        return padded([a.astype(np.float64) for a in filled]).to(device)

    gal, truncates, ref_arrays = loss.gal, loss.grpo.truncation != "none", [r.ref_logps for r in rows]
    gal_arrays = [r.old_logps for r in rows] if gal is not None and gal.ref == "old" else ref_arrays
    return MicroBatch(
        rows=rows,
        mask_BT=padded([np.ones(len(row.tokens), dtype=bool) for row in rows]).to(device),
        starts=starts,
        old_BT=by_token([r.old_logps for r in rows]),
        sampler_BT=by_token([r.sampler_logps for r in rows]) if truncates else None,
        ref_BT=None if gal is None or gal.ref == "none" else by_token(gal_arrays),
        base_BT=by_token(ref_arrays) if loss.grpo.kl > 0 else None,
        teacher_BT=by_token([r.teacher_logps for r in rows]) if loss.rollout_term == "distill" else None,
        advantage_B=column([r.advantage for r in rows]),
        rating_B=column([r.rating for r in rows]),
        correct_B=torch.tensor([r.correct for r in rows], device=device),
        off_policy_B=torch.tensor([r.member for r in rows], device=device),
        sft_share_B=column(sft_share),
        grpo_share_B=column(grpo_share),
        gal_share_G=[unit[0].w_gal / counts.mid for unit in groups],
    )


def _denominator(row: Row, counts: Counts, grpo: GRPO) -> float:
    """What a row's sum over its tokens is divided by: the one place where the terms of the policy gradient are averaged."""
    if grpo.aggregation == "token-mean":
        return counts.rl_tokens + counts.member_tokens
    return counts.mid * row.group_size * (grpo.horizon or len(row.tokens))


def components(logps_BT: Tensor, entropy_BT: Tensor, batch: MicroBatch, loss: Loss) -> Components:
    """The three sums of a micro-batch. logps_BT: response log-probs at the rows' temperatures, entropy_BT: the policy's there;
    both 0 outside the mask."""
    mask_BT, dtype = batch.mask_BT, logps_BT.dtype
    grpo_mask_BT = mask_BT & (batch.grpo_share_B != 0).unsqueeze(-1)
    sft_mask_BT = mask_BT & (batch.sft_share_B != 0).unsqueeze(-1)
    grpo_BT = policy_gradient(logps_BT, entropy_BT, batch, loss) * batch.grpo_share_B.to(dtype).unsqueeze(-1)
    supervised_BT = logps_BT * batch.sft_share_B.to(dtype).unsqueeze(-1)
    if loss.trace_weight == "phi":
        supervised_BT = supervised_BT * phi_weights(logps_BT)
    elif loss.trace_weight == "entropy":
        supervised_BT = supervised_BT * entropy_weights(entropy_BT, mask_BT, scale=SRFT_TRACE, sign=-1)
    return Components(
        sft=sft(supervised_BT, sft_mask_BT),
        grpo=torch.where(grpo_mask_BT, grpo_BT, 0.0).sum(),
        gal=alignment(logps_BT, batch, loss.gal),
    )


def alignment(logps_BT: Tensor, batch: MicroBatch, gal: GAL | None) -> Tensor:
    """The GAL sum of a micro-batch's groups; 0 without GAL."""
    value = logps_BT[:0].sum()
    if gal is None:
        return value
    summaries_B, ref_B = gal_summaries(logps_BT, batch, gal)
    for share, start, stop in zip(batch.gal_share_G, batch.starts, batch.starts[1:], strict=False):
        own_K, rating_K = summaries_B[start:stop], batch.rating_B[start:stop]
        if gal.form == "flat":
            value = value + share * flat_alignment(own_K, rating_K, beta=gal.beta)
        else:
            ref_K = None if ref_B is None else ref_B[start:stop]
            value = value + share * group_alignment(own_K, ref_K, rating_K, beta=gal.beta)
    return value


def policy_gradient(logps_BT: Tensor, entropy_BT: Tensor, batch: MicroBatch, loss: Loss) -> Tensor:
    """The policy-gradient term of each token [B, T] before its row's share: of rollouts, and of traces that are members of a
    group. Junk elsewhere."""
    rollouts_BT = _of_rollouts(logps_BT, entropy_BT, batch, loss)
    if loss.off_policy == "none":
        return rollouts_BT
    shaping = loss.shaping if loss.off_policy == "shaped" else None
    traces_BT = off_policy_surrogate(logps_BT, batch.advantage_B.to(logps_BT.dtype).unsqueeze(-1), shaping=shaping)
    return torch.where(batch.off_policy_B.unsqueeze(-1), traces_BT, rollouts_BT)


def _of_rollouts(logps_BT: Tensor, entropy_BT: Tensor, batch: MicroBatch, loss: Loss) -> Tensor:
    """Surrogate, truncation weight, KL."""
    grpo, mask_BT, dtype = loss.grpo, batch.mask_BT, logps_BT.dtype
    if loss.rollout_term == "self":
        weights_B1 = entropy_weights(entropy_BT, mask_BT, scale=SRFT_ROLLOUT, sign=1)
        return self_surrogate(logps_BT, batch.correct_B.unsqueeze(-1), weights_B1)
    old_BT, advantage = batch.old_BT.to(dtype), batch.advantage_B.to(dtype).unsqueeze(-1)
    if batch.teacher_BT is not None:
        advantage = batch.teacher_BT.to(dtype) - old_BT
    bounds = {"clip_low": grpo.clip_low, "clip_high": grpo.clip_high}
    if grpo.ratio == "sequence":
        loss_BT = sequence_surrogate(logps_BT, old_BT, mask_BT, advantage.squeeze(-1), **bounds, dual_clip=grpo.dual_clip)
    elif grpo.surrogate == "cispo":
        loss_BT = cispo(logps_BT, old_BT, advantage, **bounds)
    elif grpo.surrogate == "unclipped":
        loss_BT = unclipped_surrogate(logps_BT, old_BT, advantage)
    else:
        loss_BT = clipped_surrogate(logps_BT, old_BT, advantage, **bounds, dual_clip=grpo.dual_clip)
    if batch.sampler_BT is not None:
        weight_BT = truncated_weights(
            batch.old_BT, batch.sampler_BT, mask_BT, level=grpo.truncation, cap=grpo.truncation_cap
        )
        loss_BT = loss_BT * weight_BT.to(dtype)
    if batch.base_BT is not None:
        loss_BT = loss_BT + grpo.kl * k3(logps_BT, batch.base_BT.to(dtype))
    return loss_BT


def gal_summaries(logps_BT: Tensor, batch: MicroBatch, gal: GAL) -> tuple[Tensor, Tensor | None]:
    """Each row's log-prob reduced as GAL reads it (mean or sum over its tokens), for the policy and the reference."""
    mask_BT = batch.mask_BT
    divisor_B = batch.lengths_B if gal.logp_reduction == "mean" else 1

    def reduce(x_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, x_BT, 0.0).sum(-1) / divisor_B

    return reduce(logps_BT), None if batch.ref_BT is None else reduce(batch.ref_BT.to(logps_BT.dtype))
