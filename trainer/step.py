"""One optimizer update's gradient: micro-batches in, `.grad` filled and the numbers for the metrics out.

One idea: the losses are differentiated down to the token log-probs only (a small [B, T] tensor), component by component;
the mixture of those gradients is then sent through the model in one backward. So the losses never meet the model, and how
GRPO and GAL agree is known exactly from gradients that are there anyway.
Left out: the optimizer, clipping, what to do when a number is not finite (run.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from schemas.recipe import DypoMethod
from trainer.batch import plan_micro_batches
from trainer.forward import response_logps
from trainer.losses import pair_margins
from trainer.objective import (
    Components,
    Counts,
    MicroBatch,
    Mixture,
    Unit,
    components,
    gal_summaries,
    micro_batch,
    mixture,
)
from trainer.rows import Row


@dataclass
class Observed:
    """What one update saw, summed or listed over its micro-batches. Numbers are host floats and numpy arrays.

    log_ratios and entropies: one array a row of `rl_rows`, a value a token. margins: GAL's d of every pair, and
    length_gaps the pair's difference in tokens, right minus wrong. broken: items whose log-ratio or gradient is not finite.
    """

    counts: Counts
    mixture: Mixture
    sft: float = 0.0
    grpo: float = 0.0
    gal: float = 0.0
    rl_rows: list[Row] = field(default_factory=list)
    log_ratios: list[np.ndarray] = field(default_factory=list)
    entropies: list[np.ndarray] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    length_gaps: list[int] = field(default_factory=list)
    grpo_dot_gal: float = 0.0
    grpo_square: float = 0.0
    gal_square: float = 0.0
    prompt_tokens: int = 0
    broken: list[str] = field(default_factory=list)
    grad_norm: float = 0.0  # before clipping
    rate: float = 0.0

    @property
    def total(self) -> float:
        """The value that was differentiated."""
        return self.mixture.sft * self.sft + self.mixture.grpo * self.grpo + self.mixture.gal * self.gal


def accumulate(
    model: nn.Module,
    units: Sequence[Unit],
    counts: Counts,
    method: DypoMethod,
    *,
    micro_batch_tokens: int,
    easy_scale: float = 1.0,
    autocast: bool = False,
) -> Observed:
    """Adds the gradient of `units` to the `.grad`s. `counts` are the whole update's, of which they may be a share."""
    device = str(next(model.parameters()).device)
    seen = Observed(counts, mixture(method, counts, easy_scale=easy_scale))
    for chosen in plan_micro_batches(units, micro_batch_tokens):
        batch = micro_batch([units[i] for i in chosen], counts, method, device)
        logps_BT, entropy_BT = response_logps(model, batch.sequences, autocast=autocast)
        leaf_BT = logps_BT.detach().requires_grad_()
        values = components(leaf_BT, batch, method)
        grads = _gradients(values, leaf_BT)
        mixed_BT = seen.mixture.sft * grads.sft + seen.mixture.grpo * grads.grpo + seen.mixture.gal * grads.gal
        logps_BT.backward(mixed_BT)
        _observe(seen, batch, method, leaf_BT.detach(), entropy_BT, values, grads, mixed_BT)
    return seen


def _gradients(values: Components, leaf_BT: Tensor) -> Components:
    """d component / d log-prob of each token."""

    def of(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf_BT, retain_graph=True)[0]

    return Components(sft=of(values.sft), grpo=of(values.grpo), gal=of(values.gal))


def _observe(
    seen: Observed,
    batch: MicroBatch,
    method: DypoMethod,
    logps_BT: Tensor,
    entropy_BT: Tensor,
    values: Components,
    grads: Components,
    mixed_BT: Tensor,
) -> None:
    seen.sft += values.sft.item()
    seen.grpo += values.grpo.item()
    seen.gal += values.gal.item()
    grpo, gal = grads.grpo.double(), grads.gal.double()
    seen.grpo_dot_gal += (grpo * gal).sum().item()
    seen.grpo_square += grpo.square().sum().item()
    seen.gal_square += gal.square().sum().item()
    seen.prompt_tokens += sum(len(row.prompt_tokens) for row in batch.rows)
    log_ratio_BT = logps_BT.double() - batch.old_BT
    finite_B = (log_ratio_BT.isfinite() & mixed_BT.isfinite()).all(-1).tolist()
    seen.broken += [row.item_id for row, finite in zip(batch.rows, finite_B, strict=True) if not finite]

    log_ratios_BT = log_ratio_BT.cpu().numpy()
    entropies_BT = entropy_BT.double().cpu().numpy()
    for at, row in enumerate(batch.rows[: batch.starts[-1]]):
        seen.rl_rows.append(row)
        seen.log_ratios.append(log_ratios_BT[at, : len(row.tokens)])
        seen.entropies.append(entropies_BT[at, : len(row.tokens)])
    if method.gal_coefficient == 0:
        return
    summaries_B, ref_B = gal_summaries(logps_BT, batch, method)
    lengths_B = batch.sequences.lengths_B.double()
    for start, stop in zip(batch.starts, batch.starts[1:], strict=False):
        correct_K = batch.correct_B[start:stop]
        ref_K = None if ref_B is None else ref_B[start:stop]
        seen.margins += pair_margins(summaries_B[start:stop], ref_K, correct_K, beta=method.gal.beta).tolist()
        seen.length_gaps += pair_margins(lengths_B[start:stop], None, correct_K, beta=1.0).long().tolist()
