"""Our side: the trainer's own step over stored rows.

One idea: `gradient` is what is compared with TRL's loss + backward, and `update` is all that an update of a stored row costs:
reading it from the shard table, gradient, norm, clipping, AdamW. Both call what `dypo train` calls.
"""

from pathlib import Path

import pyarrow as pa
import torch

from schemas.recipe import DypoMethod, Optimizer, Policy
from tests.bench.case import Case, with_old_logprobs
from tests.bench.machine import Clock
from tests.trainer.tiny import accumulate_as
from trainer.forward import sequence_logprobs
from trainer.model import load_model
from trainer.objective import count
from trainer.optim import apply_update, build_optimizers, gradient_norm
from trainer.rows import Row, Shards

METHOD = DypoMethod(alpha=1.0)  # GRPO alone: what TRL computes


class Ours:
    """A model and an update's rows. batch: rows in a micro-batch, a multiple of k; it becomes a token budget."""

    def __init__(self, model: Path, shards: pa.Table, case: Case, *, batch: int) -> None:
        self.name, self.batch = "ours", batch
        self.model = load_model(model, Policy(model=model, device="cpu", threads=1))
        self.shards = Shards(shards, None)
        self.budget = batch // case.k * case.our_slots
        self.optimizer = build_optimizers(self.model.lm, METHOD, Optimizer())["main"]
        self.units = self._units()

    def gradient(self) -> float:
        """Seconds of forward, losses and backward over the update's rows; the gradient stays in `.grad`."""
        self.model.zero_grad(set_to_none=True)
        began = Clock.read()
        self._accumulate(self.units)
        return Clock.read() - began

    def update(self) -> float:
        """Seconds of a whole update, at learning rate 0: the weights stay as they are."""
        began = Clock.read()
        self._accumulate(self._units())
        apply_update(self.optimizer, rate=0.0, clip_norm=1.0, norm=gradient_norm(self.model.parameters()))
        return Clock.read() - began

    def gradients(self) -> dict[str, torch.Tensor]:
        """By parameter; needs `gradient` before."""
        return {name: p.grad.clone() for name, p in self.model.lm.named_parameters() if p.grad is not None}

    def _accumulate(self, units: list[list[Row]]) -> None:
        accumulate_as(self.model, units, count(units, len(units)), METHOD, micro_batch_tokens=self.budget)

    def _units(self) -> list[list[Row]]:
        groups: dict[str, list[tuple[str, str]]] = {}
        for route, prompt, item in zip(
            *(self.shards.table[n].to_pylist() for n in ("route", "prompt_id", "item_id")), strict=True
        ):
            groups.setdefault(prompt, []).append((route, item))
        return [self.shards.rows(keys) for keys in groups.values()]


def sampled_by(model: Path, shards: pa.Table) -> pa.Table:
    """The rows with the model's own log-probs as the sampler's, one sequence at a time: every ratio is 1."""
    loaded = load_model(model, Policy(model=model, device="cpu", threads=1))
    rows = zip(*(shards[n].to_pylist() for n in ("item_id", "prompt_tokens", "tokens")), strict=True)
    return with_old_logprobs(shards, {item: sequence_logprobs(loaded, prompt, tokens, 1.0) for item, prompt, tokens in rows})
