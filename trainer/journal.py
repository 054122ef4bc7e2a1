"""Rows of draws and metrics, kept until the next checkpoint and then written as one part of each table.

One idea: parts are written before the checkpoint that they lead up to is published. A kill in between leaves rows past the
newest checkpoint; the next start cuts them and makes them again. So no row is there twice and none is lost.
"""

import time
from collections.abc import Mapping, Sequence

import pyarrow as pa

from schemas.tables import ARROW
from trainer.job import Sink
from trainer.metrics import RowNumbers
from trainer.rows import Row
from trainer.schedule import Step


class Journal:
    """Collects; `flush` writes. Parts are named by their first step."""

    def __init__(self, sink: Sink, round: int) -> None:
        self._sink, self._round = sink, round
        self._draws: list[dict] = []
        self._metrics: list[dict] = []

    def add(self, step: Step, drawn: Sequence[Row], numbers: Mapping[str, RowNumbers], metrics: Mapping[str, float]) -> None:
        """One step: the rows it was trained on, in the plan's order, the rl rows' numbers by item, and the step's own."""
        for position, row in enumerate(drawn):
            mine = numbers.get(row.item_id) if row.route == "rl" else None
            self._draws.append(
                {
                    "round": self._round,
                    "step": step.index,
                    "position": position,
                    "item_id": row.item_id,
                    "prompt_id": row.prompt_id,
                    "route": row.route,
                    "teacher": row.teacher,
                    "age": row.age,
                    **dict.fromkeys(("log_ratio", "kl", "clip_fraction")),
                    **(vars(mine) if mine else {}),
                }
            )
        when = time.time()
        self._metrics += [
            {"round": self._round, "step": step.index, "name": name, "value": value, "when": when}
            for name, value in metrics.items()
        ]

    def flush(self) -> None:
        """Writes what was collected since the last flush."""
        if not self._metrics:
            return
        name = f"{self._metrics[0]['step']:06d}"  # the same for both, even where no row was drawn (queues that fill)
        for table, rows in (("draws", self._draws), ("metrics", self._metrics)):
            self._sink.write(table, pa.Table.from_pylist(rows, ARROW[table]), name)
            rows.clear()
