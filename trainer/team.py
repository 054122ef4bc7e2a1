"""One process or several, seen from the step: who takes which share, and how gradients are summed.

One idea: `ALONE` is a team of one, so that the step has one text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from trainer.batch import Batch
from trainer.model import PolicyLM


@dataclass(frozen=True)
class Team:
    rank: int = 0
    world: int = 1

    def run(self, model: PolicyLM, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(batch)

    @contextmanager
    def sums_gradients(self, now: bool) -> Iterator[None]:
        yield


ALONE = Team()
