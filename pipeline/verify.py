"""`dypo verify`: every file of a run held against the manifests. Reads all of it, writes nothing.

    missing, altered    what a manifest lists is gone, or has other bytes (size first, then sha256)
    unreadable          a manifest that says nothing, or a file that the disk does not give
    orphan              a file among the tables that no manifest lists and no stage will count in
    unfinished          whole parts of a stage that was cut off: its next run counts them in
    left over           what a killed writer left under a temporary name, or parts that are merged by now: swept by the next run
    older copy          of a superseded partition, set aside when the next one came

One idea: the first four are harm, the others are how a run looks that was killed or changed. Superseded partitions are
looked at too: going back to their settings brings them back. Left out: whether rows are stale, which `dypo status` tells;
a manifest's own bytes, but for whether it can be read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.store import MANIFEST, PARTITION_KEYS, keys_of, need_run, part_fingerprint, partitions, void_parts
from schemas.errors import UserError
from schemas.manifest import Manifest

HARM = ("missing", "altered", "unreadable", "orphan")


@dataclass(frozen=True)
class Found:
    """One finding: its kind, the file, and what to do about it."""

    kind: str
    path: str
    say: str


@dataclass
class Checked:
    """Complete partitions met so far, and the files and bytes that their manifests list."""

    partitions: int = 0
    files: int = 0
    bytes: int = 0


def verify(run: Path, checked: Checked) -> Iterator[Found]:
    """Findings as they come, and in `checked` what was read. UserError if the folder is no run."""
    need_run(run)
    for root in (run, *sorted(run.glob("superseded/*/*"))):
        for table in PARTITION_KEYS:
            listed: dict[Path, Manifest | None] = {}
            for part in partitions(root, table):
                try:
                    manifest = listed[part.folder] = part.manifest()
                except UserError as e:
                    listed[part.folder] = None
                    yield Found("unreadable", str(part.folder / MANIFEST), str(e))
                    continue
                if manifest is not None:
                    checked.partitions += 1
                    checked.files += len(manifest.parts)
                    checked.bytes += sum(each.bytes for each in manifest.parts)
                    try:
                        for kind, path, say in part.harm(manifest, hashed=True):
                            yield Found(kind, str(path), say)
                    except OSError as e:
                        yield Found("unreadable", str(e.filename or part.folder), f"cannot be read ({e.strerror or e})")
            yield from _unlisted(root / table, listed)


def _unlisted(root: Path, manifests: dict[Path, Manifest | None]) -> Iterator[Found]:
    """Files under a table's folder that no manifest names."""
    named = {folder / name for folder, m in manifests.items() if m for name in (MANIFEST, *(p.name for p in m.parts))}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        hidden = [word for word in path.relative_to(root).parts if word.startswith(".")]
        if hidden:
            if hidden[0].endswith(".tmp"):
                yield Found("left over", str(path), "from a writer that was killed; the stage's next run sweeps it")
            elif path.name == MANIFEST:
                yield Found("older copy", str(path.parent), "of a superseded partition: kept, and not looked at here")
            continue
        home = next((folder for folder in path.parents if folder in manifests), None)
        manifest = manifests[home] if home is not None else None
        if path in named or (home is not None and manifest is None):  # what a broken manifest listed nobody knows
            continue
        wanted = manifest.fingerprint if manifest is not None else None
        place = keys_of(root.name, path.parent.relative_to(root)) is not None
        if place and _is_void(path, manifest):
            yield Found("left over", str(path), "its rows stand in another part; the next `dypo compact` removes it")
            continue
        yield _loose(path, wanted, place)


def _is_void(path: Path, manifest: Manifest | None) -> bool:
    try:
        return path in void_parts(path.parent, {p.name for p in manifest.parts} if manifest else set())
    except UserError:  # a file beside it does not even say what it is
        return False


def _loose(path: Path, wanted: str | None, place: bool) -> Found:
    """A part beside a manifest counts if it was written under the same fingerprint; without a manifest, in a partition's `place`."""
    told = "no manifest lists it"
    if place and path.match("part-*.parquet"):
        try:
            fingerprint = part_fingerprint(path)
        except UserError as e:
            return Found("orphan", str(path), str(e))
        if wanted in (None, fingerprint):
            return Found("unfinished", str(path), "a whole part of a stage that was cut off; its next run counts it in")
        told = "no manifest lists it, and it was written under other settings than the rows beside it"
    return Found("orphan", str(path), f"{told}; move it out of the run folder")
