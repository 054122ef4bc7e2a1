"""Table `failures`: the samples that a generate stage could not get, and why.

One idea: a partition of it stands beside each partition of traces or rollouts that has any, with the same keys, and is
written anew by each run of that stage: the anti-join never reads it, so a failed sample is tried again, and is gone from
here once it is there. A kill loses at most the reasons of the run that it ended.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.engines.base import Failure
from pipeline.stage import Spec, begin, make_table
from pipeline.store import MANIFEST, partition
from schemas.tables import ARROW


def record(it: Spec, failures: Sequence[Failure]) -> None:
    """Makes the failures of stage `it` these, and no others."""
    spec = settle(it)
    part, now = spec.partition, time.time()
    (part.folder / MANIFEST).unlink(missing_ok=True)
    if failures:
        blank = {"round": None, "step": None, "suite": None, "teacher": None, **dict(part.keys), "when": now}
        rows = [{**blank, "prompt_id": f.prompt_id, "sample": f.sample, "why": f.why} for f in failures]
        make_table(spec, pa.Table.from_pylist(rows, schema=ARROW["failures"]))
    elif part.folder.exists():
        for path in part.folder.glob("part-*.parquet"):
            path.unlink()
        part.folder.rmdir()


def settle(it: Spec) -> Spec:
    """What the failures of stage `it` are made of. Those of other settings move away, as their rows do."""
    keys: dict[str, Any] = {"stage": it.stage, **dict(it.partition.keys)}
    spec = replace(it, partition=partition(it.partition.run, "failures", keys), expensive=False)
    begin(spec)
    return spec
