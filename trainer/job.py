"""What the trainer is given for one round, and where it puts what it makes. The only door between it and the pipeline.

The trainer reads Arrow tables and writes through a `Sink`; it knows nothing of run folders, manifests or fingerprints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from schemas.recipe import Policy, Train


class Sink(Protocol):
    """One round's output: parts of tables, and checkpoints. All writes are atomic and durable when they return."""

    def write(self, table: str, rows: pa.Table, part: str) -> None:
        """Adds `rows` (cast to the table's schema) to this round's partition as one part named `part`."""
        ...

    def cut(self, table: str, step: int) -> None:
        """Drops this round's rows with `step` >= the given one: what came after the checkpoint resumed from."""
        ...

    def checkpoints(self) -> dict[int, Path]:
        """The round's complete checkpoints: updates done -> folder."""
        ...

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Calls `write` on an empty temporary folder, then publishes it whole as the checkpoint after `step` updates."""
        ...

    def progress(self, done: int, total: int, note: str) -> None:
        """Tells whoever watches: steps done, steps in all, one short line of numbers."""
        ...


class Nowhere:
    """The sink of ranks other than the leader, who is the only one to write."""

    def write(self, table: str, rows: pa.Table, part: str) -> None: ...

    def cut(self, table: str, step: int) -> None: ...

    def checkpoints(self) -> dict[int, Path]:
        raise AssertionError("the leader says which there are")

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        raise AssertionError("only the leader publishes")

    def progress(self, done: int, total: int, note: str) -> None: ...


@dataclass(frozen=True)
class TrainJob:
    """One round of training.

    shards: rows of schemas.ARROW["shards"] of this round, both routes. ref, old, teacher: rows of ARROW["logprobs"] with that role
    (None when the method reads none). graded: prompts of the round by grade (easy, mid, hard). start: HF folder of the
    policy that the round begins from, with the trainer state of the round before in its `trainer/` folder if there is one.
    rounds and round place this round in the run: in its learning-rate schedule, and whether it is the last.
    """

    round: int
    rounds: int
    seed: int
    train: Train
    policy: Policy
    start: Path
    shards: pa.Table
    graded: dict[str, int]
    sink: Sink
    ref: pa.Table | None = None
    old: pa.Table | None = None
    teacher: pa.Table | None = None


@dataclass(frozen=True)
class RoundEnd:
    """How a round ended: updates done in all, and why: `steps` (all done), `ess` (below the floor) or `empty` (no rows)."""

    steps: int
    reason: str
