"""One optimizer update's gradient: micro-batches in, `.grad` filled and the numbers for the metrics out.

One idea: the losses are differentiated down to the token log-probs only (a small [B, T] tensor), component by component;
the mixture of those gradients is then sent through the model in one backward. So the losses never meet the model, and how
GRPO and GAL agree is known exactly from gradients that are there anyway. It is also what lets a group be larger than the
token budget: its log-probs are first collected piece by piece without a graph, the losses see the whole group, and each
piece runs again with the gradient of its tokens (the two passes of ALGORITHMS 7.4, for any loss).
With several processes every rank plans the whole update and takes its share of each micro-batch; ranks make the same
number of forwards, since each is a collective, with idle ones where a rank has nothing.
Left out: the optimizer, clipping, what to do when a number is not finite (run.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.methods import Loss
from trainer.batch import Batch, pack, plan_micro_batches, split, unit_sizes
from trainer.losses import pair_margins
from trainer.model import PolicyLM
from trainer.objective import (
    Components,
    Counts,
    MicroBatch,
    Mixture,
    Unit,
    components,
    gal_summaries,
    micro_batch,
    silent,
)
from trainer.rows import Row
from trainer.team import ALONE, Team


@dataclass
class Observed:
    """What one update saw, summed or listed over its micro-batches. Numbers are host floats and numpy arrays.

    log_ratios and entropies: one array a row of `rl_rows`, a value a token. margins: GAL's d of every pair, and
    length_gaps the pair's difference in tokens, right minus wrong. broken: items whose log-ratio or gradient is not finite.
    silent_rows: rl rows of groups that were not run, as they have no gradient.
    """

    counts: Counts
    mixture: Mixture
    sft: float = 0.0
    grpo: float = 0.0
    gal: float = 0.0
    rl_rows: list[Row] = field(default_factory=list)
    silent_rows: list[Row] = field(default_factory=list)
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
    more: dict[str, float] = field(default_factory=dict)  # metrics of a method's own

    @property
    def total(self) -> float:
        """The value that was differentiated."""
        return self.mixture.sft * self.sft + self.mixture.grpo * self.grpo + self.mixture.gal * self.gal


OF_THE_UPDATE = ("counts", "mixture", "grad_norm", "rate", "more")  # what every rank has alike
SUMS = [f.name for f in fields(Observed) if f.name not in OF_THE_UPDATE]


def merged(parts: Sequence[Observed]) -> Observed:
    """What all ranks saw of one update together."""
    whole = replace(parts[0])
    for part in parts[1:]:
        for name in SUMS:
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
    return whole


def accumulate(
    model: PolicyLM,
    units: Sequence[Unit],
    counts: Counts,
    loss: Loss,
    mix: Mixture,
    *,
    micro_batch_tokens: int,
    team: Team = ALONE,
) -> Observed:
    """Adds the gradient of `units` to the `.grad`s. `counts` and `mix` are the whole update's, of which they may be a share.

    With a team of several processes the `.grad`s hold the sum over its ranks, and what is returned is this rank's part.
    """
    seen = Observed(counts, mix)
    units, unrun = _to_run(units, loss)
    seen.silent_rows = [row for unit in unrun for row in unit if row.route == "rl"] if team.leads else []
    sizes = unit_sizes(units, share=model.packed)
    plan = plan_micro_batches(sizes, micro_batch_tokens, team.world)
    for at, by_rank in enumerate(plan):
        pieces = [_pieces(units, sizes, chosen, micro_batch_tokens, model.packed) for chosen in by_rank]
        passes = max(1, *map(len, pieces))
        last = at == len(plan) - 1
        mine = [units[i] for i in by_rank[team.rank]]
        batch = micro_batch(mine, counts, loss, str(model.device)) if mine else None
        _micro_step(model, batch, pieces[team.rank], passes, seen, loss, team, last)
    return seen


def _to_run(units: Sequence[Unit], loss: Loss) -> tuple[list[Unit], list[Unit]]:
    """The units with a gradient, and the others. Where no group has one, one runs all the same: the behaviour check needs its rows."""
    loud = [not silent(unit, loss) for unit in units]
    groups = [at for at, unit in enumerate(units) if unit[0].route == "rl"]
    if groups and not any(loud[at] for at in groups):
        loud[groups[0]] = True
    return [u for u, run in zip(units, loud, strict=True) if run], [u for u, run in zip(units, loud, strict=True) if not run]


def _pieces(units: Sequence[Unit], sizes: list[int], chosen: list[int], budget: int, share: bool) -> list[tuple[int, int]]:
    """(start, stop) of the rows that run together: all of a micro-batch, or parts of a unit larger than the budget."""
    if len(chosen) == 1 and sizes[chosen[0]] > budget:
        return split(units[chosen[0]], budget, share=share)
    rows = sum(len(units[i]) for i in chosen)
    return [(0, rows)] if rows else []


def _micro_step(
    model: PolicyLM,
    batch: MicroBatch | None,
    pieces: list[tuple[int, int]],
    passes: int,
    seen: Observed,
    loss: Loss,
    team: Team,
    last: bool,
) -> None:
    """Forward, losses, backward of what is this rank's of one micro-batch; nothing of its own (batch None) runs idle."""
    rows = [] if batch is None else batch.rows
    packs = [pack(rows[start:stop], model.device, share=model.packed) for start, stop in pieces]
    packs += [_idle(model)] * (passes - len(packs))
    if passes == 1:
        with team.sums_gradients(last):
            logps_BT, entropy_BT = team.run(model, packs[0])
            mixed_BT = _losses(seen, batch, loss, logps_BT.detach(), entropy_BT)
            logps_BT.backward(torch.zeros_like(logps_BT) if mixed_BT is None else mixed_BT * team.world)
        return
    with torch.no_grad():
        looks = [team.run(model, p) for p in packs][: len(pieces)]
    mixed_BT = None
    if batch is not None:
        logps_BT, entropy_BT = (_stack([look[i] for look in looks], batch.mask_BT.shape[1]) for i in (0, 1))
        mixed_BT = _losses(seen, batch, loss, logps_BT, entropy_BT)
    for at, packed in enumerate(packs):
        with team.sums_gradients(last and at == passes - 1):
            again_BT, _ = team.run(model, packed)
            if mixed_BT is None or at >= len(pieces):
                again_BT.backward(torch.zeros_like(again_BT))
            else:
                start, stop = pieces[at]
                again_BT.backward(mixed_BT[start:stop, : again_BT.shape[1]] * team.world)


def _idle(model: PolicyLM) -> Batch:
    """The smallest thing that a forward can run."""
    nothing: Any = SimpleNamespace(prompt_tokens=np.zeros(1, np.int64), tokens=np.zeros(1, np.int64), temperature=1.0)
    return pack([nothing], model.device)


def _stack(parts: list[Tensor], width: int) -> Tensor:
    """[B, width] from the rows of the pieces, which are padded to lengths of their own."""
    return torch.cat([F.pad(part_BT, (0, width - part_BT.shape[1])) for part_BT in parts])


def _losses(seen: Observed, batch: MicroBatch | None, loss: Loss, logps_BT: Tensor, entropy_BT: Tensor) -> Tensor | None:
    """d loss / d log-prob of each token, noted in `seen` on the way; None where there are no rows."""
    if batch is None:
        return None
    leaf_BT = logps_BT.requires_grad_()
    values = components(leaf_BT, entropy_BT, batch, loss)
    grads = _gradients(values, leaf_BT)
    mixed_BT = seen.mixture.sft * grads.sft + seen.mixture.grpo * grads.grpo + seen.mixture.gal * grads.gal
    _observe(seen, batch, loss, leaf_BT.detach(), entropy_BT, values, grads, mixed_BT)
    return mixed_BT


def _gradients(values: Components, leaf_BT: Tensor) -> Components:
    """d component / d log-prob of each token."""

    def of(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf_BT, retain_graph=True)[0]

    return Components(sft=of(values.sft), grpo=of(values.grpo), gal=of(values.gal))


def _observe(
    seen: Observed,
    batch: MicroBatch,
    loss: Loss,
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
    if loss.gal is None:
        return
    summaries_B, ref_B = gal_summaries(logps_BT, batch, loss.gal)
    lengths_B = batch.lengths_B.double()
    for start, stop in zip(batch.starts, batch.starts[1:], strict=False):
        rating_K = batch.rating_B[start:stop]
        ref_K = None if ref_B is None else ref_B[start:stop]
        seen.margins += pair_margins(summaries_B[start:stop], ref_K, rating_K, beta=loss.gal.beta).tolist()
        seen.length_gaps += pair_margins(lengths_B[start:stop], None, rating_K, beta=1.0).long().tolist()
