"""The mixture of one optimizer update, as weights and as the value of a micro-batch.

    L = (n_hard / n) gamma SFT + (n_mid / n) (alpha GRPO + (1 - alpha) GAL)                            DYPO Eq. 4
        with gal_weight set, the second bracket is GRPO + gal_weight GAL;  normalise = all: L * gated / (gated + easy)
    SFT   sum over Hard rows of w_sft / N * sum_t -logp_t     N = Hard tokens of the update ("token")
          or w_sft / (n_hard T_i) ("prompt")
    GRPO  sum over Mid rows of w_grpo / (n_mid k T_i) * sum_t surrogate_t
    GAL   sum over groups of w_gal / n_mid * mean over pairs (correct against not correct)

One idea: every denominator is counted from the rows of the whole update before the first forward (`count`), and becomes
a share of a row or group (`Share`). A micro-batch then only sums, so how an update is split cannot change its gradient.
Rows of weight 0 count in the denominators: a weight scales its row and gives nothing to the others.
Left out: the model, autograd, metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.recipe import DypoMethod
from trainer.batch import padded
from trainer.losses import clipped_surrogate, group_alignment, sequence_surrogate, sft
from trainer.rows import Row

Unit = list[Row]  # one sft row, or one whole group


@dataclass(frozen=True)
class Counts:
    """What an update is divided by. prompts is n; hard and mid are n_hard and n_mid."""

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
    """

    rows: list[Row]
    mask_BT: Tensor
    starts: list[int]
    old_BT: Tensor
    ref_BT: Tensor | None
    advantage_B: Tensor
    correct_B: Tensor
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
    right = [sum(row.correct for row in unit) for unit in mid]
    return Counts(
        prompts=prompts,
        hard=len(hard),
        mid=len(mid),
        rows=sum(len(unit) for unit in units),
        sft_tokens=sum(len(row.tokens) for unit in hard for row in unit),
        rl_tokens=sum(len(row.tokens) for unit in mid for row in unit),
        pairs=sum(s * (len(unit) - s) for s, unit in zip(right, mid, strict=True)),
    )


def mixture(method: DypoMethod, counts: Counts, *, easy_scale: float = 1.0) -> Mixture:
    """The weights of Eq. 4. easy_scale: gated / (gated + easy) of the round, or 1 for normalise = gated."""
    hard, mid = easy_scale * counts.hard / counts.prompts, easy_scale * counts.mid / counts.prompts
    grpo = method.alpha if method.gal_weight is None else 1.0
    return Mixture(sft=hard * method.gamma, grpo=mid * grpo, gal=mid * method.gal_coefficient)


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
        grpo_share += [row.w_grpo / (counts.mid * len(unit) * len(row.tokens)) for row in unit]
    grpo_share += [0.0] * (len(rows) - len(grpo_share))

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def by_token(arrays: list[np.ndarray | None]) -> Tensor:
        filled = [np.zeros(len(r.tokens)) if a is None else a for r, a in zip(rows, arrays, strict=True)]
        return padded([a.astype(np.float64) for a in filled]).to(device)

    ref_arrays = [r.old_logps if method.gal.ref == "old" else r.ref_logps for r in rows]
    return MicroBatch(
        rows=rows,
        mask_BT=padded([np.ones(len(row.tokens), dtype=bool) for row in rows]).to(device),
        starts=starts,
        old_BT=by_token([r.old_logps for r in rows]),
        ref_BT=None if method.gal.ref == "none" else by_token(ref_arrays),
        advantage_B=column([r.advantage for r in rows]),
        correct_B=torch.tensor([r.correct for r in rows], device=device),
        sft_share_B=column(sft_share),
        grpo_share_B=column(grpo_share),
        gal_share_G=[unit[0].w_gal / counts.mid for unit in groups],
    )


def components(logps_BT: Tensor, batch: MicroBatch, method: DypoMethod) -> Components:
    """The three sums of a micro-batch. logps_BT: response log-probs at the rows' temperatures, 0 outside the mask."""
    mask_BT, dtype = batch.mask_BT, logps_BT.dtype
    old_BT, advantage_B = batch.old_BT.to(dtype), batch.advantage_B.to(dtype)
    clips = {"clip_low": method.grpo.clip_low, "clip_high": method.grpo.clip_high}
    if method.grpo.ratio == "sequence":
        surrogate_BT = sequence_surrogate(logps_BT, old_BT, mask_BT, advantage_B, **clips)
    else:
        surrogate_BT = clipped_surrogate(logps_BT, old_BT, advantage_B.unsqueeze(-1), **clips)
    grpo_mask_BT = mask_BT & (batch.grpo_share_B != 0).unsqueeze(-1)
    sft_mask_BT = mask_BT & (batch.sft_share_B != 0).unsqueeze(-1)
    gal = logps_BT[:0].sum()
    if method.gal_coefficient > 0:
        summaries_B, ref_B = gal_summaries(logps_BT, batch, method)
        for share, start, stop in zip(batch.gal_share_G, batch.starts, batch.starts[1:], strict=False):
            ref_K = None if ref_B is None else ref_B[start:stop]
            correct_K = batch.correct_B[start:stop]
            gal = gal + share * group_alignment(summaries_B[start:stop], ref_K, correct_K, beta=method.gal.beta)
    return Components(
        sft=sft(logps_BT * batch.sft_share_B.to(dtype).unsqueeze(-1), sft_mask_BT),
        grpo=torch.where(grpo_mask_BT, surrogate_BT * batch.grpo_share_B.to(dtype).unsqueeze(-1), 0.0).sum(),
        gal=gal,
    )


def gal_summaries(logps_BT: Tensor, batch: MicroBatch, method: DypoMethod) -> tuple[Tensor, Tensor | None]:
    """Each row's log-prob reduced as GAL reads it (mean or sum over its tokens), for the policy and the reference."""
    mask_BT = batch.mask_BT
    divisor_B = batch.lengths_B if method.gal.logp_reduction == "mean" else 1

    def reduce(x_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, x_BT, 0.0).sum(-1) / divisor_B

    return reduce(logps_BT), None if batch.ref_BT is None else reduce(batch.ref_BT.to(logps_BT.dtype))
