"""How a stage decides what to do: fingerprints, work that is finished already, superseded partitions, manifests.

A stage is a function of complete upstream partitions and a slice of the recipe. `Spec` names both; `begin` compares
it with what lies on disk (nothing / the same / something else), `finish` writes the manifest last.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from pipeline.rows_digest import digest_parts
from pipeline.store import MANIFEST, Partition, fsync_folder, part_version, partition, read_parts, sha256_file
from schemas.columns import SCHEMA_VERSION
from schemas.errors import UserError
from schemas.ids import digest
from schemas.manifest import Manifest, Part

# Bumped by hand when a stage's outputs would change for the same inputs.
VERSIONS = {
    "ingest": 1,
    "teachers": 1,
    "rollouts": 1,
    "skips": 1,
    "score": 1,
    "grade": 1,
    "ratings": 1,
    "route": 1,
    "logprobs": 1,
    "train": 1,
    "eval_rollouts": 1,
    "eval": 2,  # intervals are the bootstrap's
}


@dataclass(frozen=True)
class Spec:
    """What one partition is to be made of. `expensive`: doing it again needs the user's --regenerate."""

    stage: str
    partition: Partition
    config: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    expensive: bool = False

    @property
    def fingerprint(self) -> str:
        return digest([self.stage, VERSIONS[self.stage], self.config, self.parents, self.seed])


def settings(model: BaseModel, *, without: Iterable[str] = (), later: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe table as a Spec's config. `later`: keys that the recipe got after runs were made; they count where they are set, so
    that those runs are not stale."""
    fields = type(model).model_fields
    unset = {k for k in later if k in fields and getattr(model, k) == fields[k].get_default(call_default_factory=True)}
    return model.model_dump(mode="json", exclude={*without, *unset})


@dataclass(frozen=True)
class Outcome:
    """What a stage did to one partition, for people and for --json."""

    stage: str
    partition: str
    action: str  # made | added | nothing
    why: str
    rows: int
    added: int = 0
    failed: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def superseded(spec_stage: str, part: Partition, fingerprint: str) -> Path:
    return part.run / "superseded" / spec_stage / fingerprint[:16] / part.label


def found_fingerprint(part: Partition) -> str | None:
    """The fingerprint of what lies in a partition's folder, complete or not; None if there is nothing."""
    from pipeline.store import part_fingerprint

    if manifest := part.manifest():
        return manifest.fingerprint
    for path in sorted(part.folder.glob("part-*.parquet")):
        return part_fingerprint(path)
    return None


def changes(spec: Spec, manifest: Manifest | None) -> str:
    """Which config keys, parents or seed differ from what the partition was made of."""
    if manifest is None:
        return "unfinished work of another recipe lies there"
    old, new = _flat(manifest.config), _flat(spec.config)
    out = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    out += [
        f"input {k} changed"
        for k in sorted({*manifest.parents, *spec.parents})
        if manifest.parents.get(k) != spec.parents.get(k)
    ]
    if manifest.seed != spec.seed:
        out.append(f"seed: {manifest.seed} -> {spec.seed}")
    return "; ".join(out) or f"stage version is now {VERSIONS[spec.stage]}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def begin(spec: Spec, *, regenerate: bool = False) -> None:
    """Makes the partition's folder hold only rows of this fingerprint: what lies there under another one is moved to
    RUN/superseded, a superseded partition of this very fingerprint is brought back.

    UserError when that would throw away generated text or an unfinished training without --regenerate.
    """
    part = spec.partition
    part.remove_temporary()
    restore(spec)
    found = found_fingerprint(part)
    if found is not None and found != spec.fingerprint:
        if spec.expensive and not regenerate:
            raise UserError(
                f"{part.folder}: made from other settings ({changes(spec, part.manifest())}). Making it again is "
                "expensive: pass --regenerate to do it (the old rows move to superseded/), or restore the setting"
            )
        move(part.folder, superseded(spec.stage, part, found))


def restore(spec: Spec) -> None:
    """Brings a superseded partition of this very fingerprint back; what lies in its place is superseded in turn."""
    part = spec.partition
    kept = superseded(spec.stage, part, spec.fingerprint)
    if kept.exists() and (found := found_fingerprint(part)) != spec.fingerprint:
        if found is not None:
            move(part.folder, superseded(spec.stage, part, found))
        move(kept, part.folder)


def put_back(spec: Spec, before: str | None) -> None:
    """Undoes a `begin` after which no row was written: what it moved away (fingerprint `before`) comes back."""
    part = spec.partition
    if before not in (None, spec.fingerprint) and not parts_of(spec):
        part.remove_temporary()
        if part.folder.exists():
            part.folder.rmdir()
        move(superseded(spec.stage, part, before), part.folder)


def set_aside(spec: Spec) -> None:
    """Moves a partition of this very fingerprint away for good: its rows are not to be found again."""
    part = spec.partition
    move(part.folder, part.run / "superseded" / spec.stage / "set_aside" / part.label)


def move(source: Path, target: Path) -> None:
    """Renames a folder. One that lies at the target already (an older copy of the same fingerprint) is kept under a number."""
    if target.exists():
        n = 1
        while (older := target.with_name(f".{target.name}.{n}")).exists():
            n += 1
        target.rename(older)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def parts_of(spec: Spec) -> list[Path]:
    """Every finished part of this fingerprint, listed or loose."""
    part = spec.partition
    manifest = part.manifest()
    listed = part.files() if manifest and manifest.fingerprint == spec.fingerprint else []
    return listed + part.loose(spec.fingerprint)


def finished(spec: Spec, columns: Iterable[str]) -> set[tuple]:
    """The values of `columns` in finished rows: what the anti-join takes from the work list."""
    names = list(columns)
    rows = read_parts(parts_of(spec), spec.partition.table, names)
    return set(zip(*(rows.column(n).to_pylist() for n in names), strict=True)) if rows.num_rows else set()


def finish(spec: Spec, *, failed: int = 0, facts: dict[str, Any] | None = None, started: float | None = None) -> Outcome:
    """Writes the manifest over every finished part. A doubled key is a defect and stops here."""
    part = spec.partition
    before = part.manifest()
    known = {p.name: p for p in before.parts} if before else {}
    paths = sorted(parts_of(spec))
    digested = digest_parts(paths, part.table)
    parts = [known.get(path.name) or describe_part(path) for path in paths]
    rows = sum(p.rows for p in parts)
    added = rows - (before.rows if before else 0)
    seconds = time.monotonic() - started if started else 0.0
    rate = {"rows_per_s": float(f"{added / seconds:.4g}")} if seconds > 0 and added else {}
    manifest = Manifest(
        table=part.table,
        keys=dict(part.keys),
        stage=spec.stage,
        fingerprint=spec.fingerprint,
        config=spec.config,
        parents=spec.parents,
        parts=parts,
        rows=rows,
        rows_digest=digested,
        seed=spec.seed,
        code=code_revision(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        failed=failed,
        facts={**(before.facts if before else {}), **(facts or {}), **rate},
    )
    part.complete(manifest)
    action = "added" if before else "made"
    return Outcome(spec.stage, part.label, action, "", rows, added, failed, seconds, manifest.facts)


def describe(path: Path, rows: int, name: str | None = None, version: int = SCHEMA_VERSION) -> Part:
    """A file as a manifest lists it."""
    return Part(
        name=name or path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256_file(path), schema_version=version
    )


def describe_part(path: Path) -> Part:
    """A table's part as a manifest lists it."""
    return describe(path, pq.read_metadata(path).num_rows, version=part_version(path))


def nothing(spec: Spec) -> Outcome:
    """The partition is complete and its work list is empty."""
    manifest = spec.partition.manifest()
    assert manifest is not None
    why = f"same fingerprint {spec.fingerprint[:12]} and no work left"
    return Outcome(
        spec.stage, spec.partition.label, "nothing", why, manifest.rows, failed=manifest.failed, facts=manifest.facts
    )


def current(spec: Spec) -> bool:
    """Whether the partition is complete under this very fingerprint (its work list may still have grown)."""
    manifest = spec.partition.manifest()
    return manifest is not None and manifest.fingerprint == spec.fingerprint


def make_table(spec: Spec, rows: pa.Table, *, facts: dict[str, Any] | None = None, started: float | None = None) -> Outcome:
    """The whole life of a partition that is computed in one go: begin, one part, manifest. Not for one that is current."""
    begin(spec)
    for path in parts_of(spec):
        path.unlink()
    if rows.num_rows:
        spec.partition.write(rows, spec.fingerprint)
    else:
        spec.partition.folder.mkdir(parents=True, exist_ok=True)
    return finish(spec, facts=facts, started=started)


def place_parts(spec: Spec, made: list[Path], *, facts: dict[str, Any], started: float) -> Outcome:
    """As `make_table`, from part files that lie finished elsewhere in the run folder: begin, renames, manifest."""
    begin(spec)
    for path in parts_of(spec):
        path.unlink()
    spec.partition.folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        os.replace(path, spec.partition.folder / path.name)
    fsync_folder(spec.partition.folder)
    return finish(spec, facts=facts, started=started)


def counts(rows: pa.Table, column: str) -> dict[str, int]:
    """How often each value stands in a column, for a manifest's facts."""
    return dict(sorted(Counter(rows.column(column).to_pylist()).items()))


def need(run: Path, table: str, keys: Mapping[str, str | int | None], *, command: str) -> Manifest:
    """The verified manifest of an upstream partition; UserError names the command that makes it."""
    part = partition(run, table, keys)
    manifest = part.manifest()
    if manifest is None:
        raise UserError(f"{part.folder}: not there or not finished ({MANIFEST} is missing). Run `{command}` first")
    part.verify()
    return manifest


@cache
def code_revision() -> str:
    """The git commit of this checkout (with + if changed), else the package's version."""
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode == 0:
            dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True)
            return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    return version("dypo")
