"""The mixture of one optimizer update, as weights and as the value of a micro-batch.

    L = (n_hard / n) gamma SFT + (n_mid / n) (alpha GRPO + (1 - alpha) GAL)                            DYPO Eq. 4
        with gal_weight set, the second bracket is GRPO + gal_weight GAL;  normalise = all: L * gated / (gated + easy)
    SFT   sum over Hard rows of w_sft / N * sum_t -logp_t     N = Hard tokens of the update ("token")
          or w_sft / (n_hard T_i) ("prompt")
    GRPO  sum over Mid rows of w_grpo * share_i * sum_t (weight_t surrogate_t + kl k3_t)
          share_i = 1 / (n_mid k T_i) (seq-mean-token-mean), 1 / Mid tokens (token-mean), 1 / (n_mid k horizon) (the last)
    GAL   sum over groups of w_gal / n_mid * mean over pairs (correct against not correct, or R(s) > R(f))

One idea: every denominator is counted from the rows of the whole update before the first forward (`count`), and becomes
a share of a row or group (`Share`). A micro-batch then only sums, so how an update is split cannot change its gradient.
Rows of weight 0 count in the denominators: a weight scales its row and gives nothing to the others. So do masked rows (cut at
max_tokens, if the recipe says so): they have no share of GRPO and are in no pair of GAL.
Left out: the model, autograd, metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.recipe import GRPO, DypoMethod
from trainer.batch import padded
from trainer.losses import cispo, clipped_surrogate, group_alignment, k3, sequence_surrogate, sft, truncated_weights
from trainer.rows import Row

Unit = list[Row]  # one sft row, or one whole group


@dataclass(frozen=True)
class Counts:
    """What an update is divided by. prompts is n; hard and mid are n_hard and n_mid. pairs: those that GAL forms."""

    prompts: int
    hard: int
    mid: int
    rows: int
    sft_tokens: int
    rl_tokens: int
    pairs: int


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
    (None: it has none). base_BT: the KL's (None: no KL). rating_B: what GAL's pairs compare (`Row.rating`).
    """

    rows: list[Row]
    mask_BT: Tensor
    starts: list[int]
    old_BT: Tensor
    sampler_BT: Tensor | None
    ref_BT: Tensor | None
    base_BT: Tensor | None
    advantage_B: Tensor
    rating_B: Tensor
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
    )


def mixture(method: DypoMethod, counts: Counts, *, easy_scale: float = 1.0) -> Mixture:
    """The weights of Eq. 4. easy_scale: gated / (gated + easy) of the round, or 1 for normalise = gated."""
    hard, mid = easy_scale * counts.hard / counts.prompts, easy_scale * counts.mid / counts.prompts
    return Mixture(sft=hard * method.gamma, grpo=mid * method.grpo_coefficient, gal=mid * method.gal_coefficient)


def micro_batch(units: Sequence[Unit], counts: Counts, method: DypoMethod, device: str = "cpu") -> MicroBatch:
    """The tensors of some units of an update whose denominators are `counts`."""
    groups = [unit for unit in units if unit[0].route == "rl"]
    rows = [row for unit in groups for row in unit] + [row for u in units if u[0].route == "sft" for row in u]
    starts = np.cumsum([0, *(len(unit) for unit in groups)]).tolist()
    sft_share, grpo_share = [], []
    for row in rows:
        hard_denominator = counts.sft_tokens if method.sft_reduction == "token" else counts.hard * len(row.tokens)
        sft_share.append(row.w_sft / hard_denominator if row.route == "sft" else 0.0)
    for unit in groups:
        grpo_share += [0.0 if r.masked else r.w_grpo / _denominator(r, len(unit), counts, method.grpo) for r in unit]
    grpo_share += [0.0] * (len(rows) - len(grpo_share))

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def by_token(arrays: list[np.ndarray | None]) -> Tensor:
        filled = [np.zeros(len(r.tokens)) if a is None else a for r, a in zip(rows, arrays, strict=True)]
        return padded([a.astype(np.float64) for a in filled]).to(device)

    truncates, ref_arrays = method.grpo.truncation != "none", [r.ref_logps for r in rows]
    gal_arrays = [r.old_logps for r in rows] if method.gal.ref == "old" else ref_arrays
    return MicroBatch(
        rows=rows,
        mask_BT=padded([np.ones(len(row.tokens), dtype=bool) for row in rows]).to(device),
        starts=starts,
        old_BT=by_token([r.old_logps for r in rows]),
        sampler_BT=by_token([r.sampler_logps for r in rows]) if truncates else None,
        ref_BT=None if method.gal.ref == "none" else by_token(gal_arrays),
        base_BT=by_token(ref_arrays) if method.grpo.kl > 0 else None,
        advantage_B=column([r.advantage for r in rows]),
        rating_B=column([r.rating for r in rows]),
        sft_share_B=column(sft_share),
        grpo_share_B=column(grpo_share),
        gal_share_G=[unit[0].w_gal / counts.mid for unit in groups],
    )


def _denominator(row: Row, group_size: int, counts: Counts, grpo: GRPO) -> float:
    """What a Mid row's sum over its tokens is divided by: the one place where GRPO's terms are averaged."""
    if grpo.aggregation == "token-mean":
        return counts.rl_tokens
    return counts.mid * group_size * (grpo.horizon or len(row.tokens))


def components(logps_BT: Tensor, batch: MicroBatch, method: DypoMethod) -> Components:
    """The three sums of a micro-batch. logps_BT: response log-probs at the rows' temperatures, 0 outside the mask."""
    mask_BT, dtype = batch.mask_BT, logps_BT.dtype
    grpo_mask_BT = mask_BT & (batch.grpo_share_B != 0).unsqueeze(-1)
    sft_mask_BT = mask_BT & (batch.sft_share_B != 0).unsqueeze(-1)
    grpo_BT = policy_gradient(logps_BT, batch, method.grpo) * batch.grpo_share_B.to(dtype).unsqueeze(-1)
    gal = logps_BT[:0].sum()
    if method.gal_coefficient > 0:
        summaries_B, ref_B = gal_summaries(logps_BT, batch, method)
        for share, start, stop in zip(batch.gal_share_G, batch.starts, batch.starts[1:], strict=False):
            ref_K = None if ref_B is None else ref_B[start:stop]
            rating_K = batch.rating_B[start:stop]
            gal = gal + share * group_alignment(summaries_B[start:stop], ref_K, rating_K, beta=method.gal.beta)
    return Components(
        sft=sft(logps_BT * batch.sft_share_B.to(dtype).unsqueeze(-1), sft_mask_BT),
        grpo=torch.where(grpo_mask_BT, grpo_BT, 0.0).sum(),
        gal=gal,
    )


def policy_gradient(logps_BT: Tensor, batch: MicroBatch, grpo: GRPO) -> Tensor:
    """The GRPO term of each token [B, T] before its row's share: surrogate, truncation weight, KL. Junk outside Mid rows."""
    mask_BT, dtype = batch.mask_BT, logps_BT.dtype
    old_BT, advantage_B = batch.old_BT.to(dtype), batch.advantage_B.to(dtype)
    bounds = {"clip_low": grpo.clip_low, "clip_high": grpo.clip_high}
    if grpo.ratio == "sequence":
        loss_BT = sequence_surrogate(logps_BT, old_BT, mask_BT, advantage_B, **bounds, dual_clip=grpo.dual_clip)
    elif grpo.surrogate == "cispo":
        loss_BT = cispo(logps_BT, old_BT, advantage_B.unsqueeze(-1), **bounds)
    else:
        loss_BT = clipped_surrogate(logps_BT, old_BT, advantage_B.unsqueeze(-1), **bounds, dual_clip=grpo.dual_clip)
    if batch.sampler_BT is not None:
        weight_BT = truncated_weights(
            batch.old_BT, batch.sampler_BT, mask_BT, level=grpo.truncation, cap=grpo.truncation_cap
        )
        loss_BT = loss_BT * weight_BT.to(dtype)
    if batch.base_BT is not None:
        loss_BT = loss_BT + grpo.kl * k3(logps_BT, batch.base_BT.to(dtype))
    return loss_BT


def gal_summaries(logps_BT: Tensor, batch: MicroBatch, method: DypoMethod) -> tuple[Tensor, Tensor | None]:
    """Each row's log-prob reduced as GAL reads it (mean or sum over its tokens), for the policy and the reference."""
    mask_BT = batch.mask_BT
    divisor_B = batch.lengths_B if method.gal.logp_reduction == "mean" else 1

    def reduce(x_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, x_BT, 0.0).sum(-1) / divisor_B

    return reduce(logps_BT), None if batch.ref_BT is None else reduce(batch.ref_BT.to(logps_BT.dtype))
