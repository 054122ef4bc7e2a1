"""`dypo compact`: the small parts of a partition become large ones, with the same rows and the same identity.

Stages write a part for each batch, so that a kill costs one of them; thousands of small files then slow every reader down.
One idea: a merged part carries the names of those that it was made from, so at each instant either they count or it does
(store.Partition.void), and no kill can lose or double a row. The manifest that lists the merged parts is published last. The
old files stay where they are until the next compaction, or the next stage that writes to the partition: whoever opened the old
list can go on reading. Left out: parts that no manifest lists yet; prompts, grades and shards, which are written large.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from pipeline.rows_digest import digest_parts
from pipeline.stage import describe_part
from pipeline.store import (
    GROUPS_IN_PART,
    MERGED,
    Partition,
    as_declared,
    need_run,
    partitions,
    publish,
    read_parts,
    regrouped,
    rows_in_group,
    write_part,
)
from schemas.errors import WorkError
from schemas.manifest import Manifest, Part

TABLES = ("traces", "rollouts", "scores", "eval_rollouts", "logprobs")


@dataclass(frozen=True)
class Compacted:
    """What became of one partition: how many parts it had, has now, and the rows in them."""

    partition: str
    before: int
    after: int
    rows: int


def compact(run: Path) -> Iterator[Compacted]:
    """Compacts every complete partition of the tables that grow by batches. UserError for a run with an altered part."""
    need_run(run)
    for table in TABLES:
        for part in partitions(run, table):
            part.remove_temporary()
            manifest = part.manifest()
            assert manifest is not None
            bins = _bins(manifest, GROUPS_IN_PART * rows_in_group(table))
            if any(len(each) > 1 for each in bins):
                part.verify()
                _replace(part, manifest, [_merge(part, manifest, each) if len(each) > 1 else each[0] for each in bins])
            yield Compacted(part.label, len(manifest.parts), len(bins), manifest.rows)


def _bins(manifest: Manifest, full: int) -> list[list[Part]]:
    """The parts as neighbours that become one: small ones up to `full` rows, others alone."""
    bins: list[list[Part]] = []
    for part in manifest.parts:
        small = part.rows <= full // 2
        if small and bins and bins[-1][-1].rows <= full // 2 and sum(p.rows for p in bins[-1]) + part.rows <= full:
            bins[-1].append(part)
        else:
            bins.append([part])
    return bins


def _merge(part: Partition, manifest: Manifest, sources: list[Part]) -> Part:
    """One part with the rows of these, read one after the other."""
    names = [p.name for p in sources]
    batches = chain.from_iterable(read_parts([part.folder / name], part.table).to_batches() for name in names)
    groups = (as_declared(group, part.table) for group in regrouped(batches, rows_in_group(part.table)))
    write = partial(write_part, table=part.table, groups=groups, fingerprint=manifest.fingerprint, merged=names)
    return describe_part(publish(part.folder / part.next_part(MERGED), write))


def _replace(part: Partition, manifest: Manifest, parts: list[Part]) -> None:
    """Publishes the manifest of the new parts, if they have the rows of the old ones. What merged parts replace stays a while."""
    rows, digest = sum(p.rows for p in parts), digest_parts([part.folder / p.name for p in parts], part.table)
    if (rows, digest) != (manifest.rows, manifest.rows_digest):
        raise WorkError(
            f"{part.folder}: compacted, it would have {rows} rows with digest {digest[:12]}, but its manifest says {manifest.rows} with "
            f"{manifest.rows_digest[:12]}. Nothing was replaced; `dypo verify {part.run}` tells whether a file is altered"
        )
    part.complete(manifest.model_copy(update={"parts": parts}))
