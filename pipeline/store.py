"""The run folder: one partition = one folder of Parquet parts and a manifest written last.

Idea: a part is published by one rename and carries its stage's fingerprint in its own Parquet metadata. Parts that the
manifest lists are the table; parts beside it with the right fingerprint are finished work of a stage that was cut off,
and the next run counts them in. There is no progress file to get out of step. Left out: appending to a part, deleting
rows, any state that is not a file with a name.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.interrupts import database
from schemas.columns import META_TABLE, META_VERSION, SCHEMA_VERSION
from schemas.errors import UserError, WorkError
from schemas.manifest import Manifest
from schemas.migrations import lacking
from schemas.tables import ARROW, TABLES

if TYPE_CHECKING:
    import duckdb

META_FINGERPRINT = b"dypo.fingerprint"
META_MERGED = b"dypo.merged_from"
MERGED = ".merged.parquet"  # how the name of a part ends that was made from others
MANIFEST = "manifest.json"
ROW_GROUP = 1024  # of rows with texts or token lists: one prompt is a matter of milliseconds
ROW_GROUP_OF_KEYS = 64 * ROW_GROUP
GROUPS_IN_PART = 64  # of a table that is written as a stream
PARTITION_KEYS = {name: t.partitions for name, t in TABLES.items()} | {"checkpoints": ("round", "step")}
_UNIQUE = ("rollout_id", "trace_id", "item_id", "id")  # a dictionary of them is as large as they are
_SPLIT = ("prompt_tokens", "tokens", "logprobs", "old_logprobs")  # byte-stream split: 0.35 of raw for ids (measured)


@dataclass(frozen=True)
class Partition:
    """One folder of one table: `keys` are the partition columns that apply, in the table's order."""

    run: Path
    table: str
    keys: tuple[tuple[str, str | int], ...] = ()

    @property
    def label(self) -> str:
        return "/".join([self.table, *(f"{k}={v}" for k, v in self.keys)])

    @property
    def folder(self) -> Path:
        return self.run / self.label

    def manifest(self) -> Manifest | None:
        """The manifest if the partition is complete. UserError if it cannot be read or is of an unknown version."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = Manifest.model_validate_json(path.read_text())
        except (ValueError, OSError) as e:
            raise UserError(f"{path}: not a manifest of ours ({e}). {_way_out(self)}") from None
        if manifest.schema_version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {manifest.schema_version}, but this dypo knows up to {SCHEMA_VERSION}. "
                "Use the dypo that wrote it, or a newer one"
            )
        return manifest

    def loose(self, fingerprint: str) -> list[Path]:
        """Finished parts with this fingerprint that no manifest lists yet: the work of a stage that was cut off."""
        listed = {p.name for p in m.parts} if (m := self.manifest()) else set()
        paths = sorted(p for p in self.folder.glob("part-*.parquet") if p.name not in listed)
        void = self.void() if paths else set()
        return [p for p in paths if p not in void and part_fingerprint(p) == fingerprint]

    def void(self) -> set[Path]:
        """Parts whose rows count in other parts."""
        return void_parts(self.folder, {p.name for p in m.parts} if (m := self.manifest()) else set())

    def files(self) -> list[Path]:
        """The listed parts; each must exist at its recorded size (contents are hashed by `verify`)."""
        return self._whole(hashed=False)

    def versions(self) -> dict[Path, int]:
        """The listed parts, as `files` checks them, with the schema version of each."""
        manifest = self.manifest()
        return dict(zip(self.files(), (p.schema_version for p in manifest.parts), strict=True)) if manifest else {}

    def verify(self) -> None:
        """Hashes every listed part against the manifest. UserError names the file and the way out."""
        self._whole(hashed=True)

    def _whole(self, *, hashed: bool) -> list[Path]:
        manifest = self.manifest()
        if manifest is None:
            return []
        for _, path, say in self.harm(manifest, hashed=hashed):
            raise UserError(f"{path}: {say}")
        return [self.folder / part.name for part in manifest.parts]

    def harm(self, manifest: Manifest, *, hashed: bool) -> Iterator[tuple[str, Path, str]]:
        """(missing or altered, file, what and the way out) for each listed part that is not as the manifest says."""
        for part in manifest.parts:
            path = self.folder / part.name
            if not path.exists():
                yield "missing", path, f"missing, but its manifest lists it ({part.rows} rows). {_way_out(self)}"
            elif (size := path.stat().st_size) != part.bytes:
                told = f"{size} bytes, but its manifest says {part.bytes}: truncated or altered"
                yield "altered", path, f"{told}. {_way_out(self)}"
            elif hashed and (found := sha256_file(path)) != part.sha256:
                told = f"sha256 {found[:12]}..., but its manifest says {part.sha256[:12]}...: altered"
                yield "altered", path, f"{told}. {_way_out(self)}"

    def next_part(self, end: str = ".parquet") -> str:
        """A part's name that is not taken."""
        taken = [int(p.name[5:].split(".")[0]) for p in self.folder.glob("part-*.parquet")]
        return f"part-{max(taken, default=-1) + 1:05d}{end}"

    def write(self, rows: pa.Table, fingerprint: str, name: str | None = None) -> Path:
        """Publishes rows as one part: cast to the table's schema, written to a temporary name, fsynced, renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = name or self.next_part()
        declared = as_declared(rows, self.table)
        return publish(self.folder / name, lambda path: write_part(path, self.table, [declared], fingerprint))

    def complete(self, manifest: Manifest) -> None:
        """Writes the manifest: from now on the partition is in the views."""
        publish(self.folder / MANIFEST, lambda p: p.write_text(manifest.model_dump_json(indent=1) + "\n"))

    def remove_temporary(self) -> None:
        """Sweeps what a killed writer or a compaction left behind; only the holder of the run's lock may call it."""
        for path in sorted(self.void()):
            path.unlink()
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _way_out(partition: Partition) -> str:
    return (
        f"Restore the file from a copy, or delete {partition.folder} and run its stage again "
        "(rows that can be made again are made again with the same ids)"
    )


def publish(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file under a temporary name beside `path`, fsyncs, renames, fsyncs the folder."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fsync_folder(path.parent)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise WorkError(
            f"{path}: could not be written ({e.strerror or e}). Finished parts are kept; make room or fix the folder, "
            "then run the same command again"
        ) from e
    return path


def as_declared(rows: pa.Table, table: str) -> pa.Table:
    """The rows with the table's columns, in its order and types; what counts a list's elements is counted."""
    schema = ARROW[table]
    rows = TABLES[table].counted(rows)
    return pa.Table.from_arrays([rows.column(f.name).cast(f.type) for f in schema], schema=schema)


def write_part(
    path: Path, table: str, groups: Iterable[pa.Table], fingerprint: str, merged: list[str] | None = None
) -> None:
    """One Parquet file of a table's rows as declared; memory holds one of `groups` at a time.

    merged: the names of the parts that these rows stand in already, where this part is to take their place.
    """
    of = {META_MERGED: json.dumps(merged).encode()} if merged else {}
    schema = ARROW[table]
    split = [f"{f.name}.list.element" for f in schema if f.name in _SPLIT]
    whole = [f.name for f in schema if f.name not in _SPLIT and f.name not in _UNIQUE]
    with pq.ParquetWriter(
        path,
        schema.with_metadata({**(schema.metadata or {}), META_FINGERPRINT: fingerprint.encode(), **of}),
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=whole,  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT") if split else None,  # pyright: ignore[reportArgumentType]
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=rows_in_group(table))


def write_parts(folder: Path, table: str, batches: Iterable[pa.RecordBatch], fingerprint: str) -> list[Path]:
    """A stream of rows as part files in a folder of their own, cut at the same rows however the stream is cut."""
    folder.mkdir(parents=True)
    groups = (as_declared(group, table) for group in regrouped(batches, rows_in_group(table)))
    paths = []
    for first in groups:
        path = folder / f"part-{len(paths):05d}.parquet"
        whole = chain([first], islice(groups, GROUPS_IN_PART - 1))
        publish(path, partial(write_part, table=table, groups=whole, fingerprint=fingerprint))
        paths.append(path)
    return paths


def rows_in_group(table: str) -> int:
    """Rows in a row group of a table's parts."""
    if table == "shards":  # read whole, or by prompt, by which they are sorted
        return 4 * ROW_GROUP
    heavy = any(pa.types.is_list(f.type) or f.name == "text" for f in ARROW[table])
    return ROW_GROUP if heavy else ROW_GROUP_OF_KEYS


def regrouped(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The stream as tables of exactly so many rows, but for the last."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(b.num_rows for b in held) >= rows:
            table = pa.Table.from_batches(held)
            yield table.slice(0, rows)
            held = table.slice(rows).to_batches()
    if held and sum(b.num_rows for b in held):
        yield pa.Table.from_batches(held)


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def part_fingerprint(path: Path) -> str:
    """The fingerprint a part was written under. UserError when the file is no part of ours."""
    return _part_metadata(path).get(META_FINGERPRINT, b"").decode()


def merged_from(path: Path) -> list[str]:
    """The names of the parts that a compaction made this one from."""
    return json.loads(_part_metadata(path).get(META_MERGED, b"[]"))


def void_parts(folder: Path, listed: set[str]) -> set[Path]:
    """Of a folder's parts, of which a manifest lists some, those whose rows stand in other parts too and count there.

    A merged part (compact.py) counts once the manifest lists it, or one of those that it was made from is gone; until then they do.
    """
    out = set()
    for path in folder.glob(f"part-*{MERGED}"):
        sources = [folder / name for name in merged_from(path)]
        here = {source for source in sources if source.exists()}
        out |= here if path.name in listed or len(here) < len(sources) else {path}
    return out


def part_version(path: Path) -> int:
    """The schema version of a part. UserError when the file is no part of ours."""
    return int(_part_metadata(path)[META_VERSION])


def _part_metadata(path: Path) -> dict[bytes, bytes]:
    try:
        meta = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError(f"{path}: not a whole Parquet file ({e}). Delete it; its rows will be made again") from None
    if META_TABLE not in meta:
        raise UserError(f"{path}: a Parquet file that dypo did not write. Move it out of the run folder")
    if int(meta[META_VERSION]) > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {meta[META_VERSION].decode()}, but this dypo knows up to {SCHEMA_VERSION}. "
            "Use the dypo that wrote it, or a newer one"
        )
    return meta


def read_parts(paths: list[Path], table: str, columns: list[str] | None = None) -> pa.Table:
    """Parts as one Arrow table of the declared schema, older versions migrated; page checksums are verified."""
    schema = ARROW[table] if columns is None else pa.schema([ARROW[table].field(c) for c in columns])
    tables = []
    for path in paths:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                version = int((file.schema_arrow.metadata or {}).get(META_VERSION, SCHEMA_VERSION))
                lacks = lacking(TABLES[table], version)
                got = file.read(columns=list(dict.fromkeys(lacks.get(c, c) for c in schema.names)))
        except (pa.ArrowInvalid, pa.ArrowIOError, OSError) as e:
            raise UserError(f"{path}: cannot be read ({e}). Delete it; its rows will be made again") from None
        got = TABLES[table].counted(got) if lacks else got
        missing = [f.name for f in schema if f.name not in got.column_names]
        if missing:
            raise UserError(f"{path}: lacks column {', '.join(missing)} of table {table}; it has {got.column_names}")
        tables.append(got.select(schema.names).cast(schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def partition(run: Path, table: str, keys: Mapping[str, str | int | None] | None = None) -> Partition:
    """The partition of `table` with these keys; keys that are None are left out of the path."""
    given = keys or {}
    return Partition(run, table, tuple((k, v) for k in PARTITION_KEYS[table] if (v := given.get(k)) is not None))


def partitions(run: Path, table: str) -> list[Partition]:
    """Every complete partition of a table, in the order of its keys (rounds and steps as numbers)."""
    root = run / table
    found = []
    for path in root.rglob(MANIFEST) if root.exists() else []:
        if any(p.startswith(".") for p in path.relative_to(root).parts):
            continue  # what a killed writer left behind
        keys = keys_of(table, path.parent.relative_to(root))
        if keys is not None:
            found.append(Partition(run, table, keys))
    return sorted(found, key=lambda p: [(k, v if isinstance(v, int) else 0, str(v)) for k, v in p.keys])


def keys_of(table: str, folder: Path) -> tuple[tuple[str, str | int], ...] | None:
    """The keys that a folder under the table's says, as `round=0/step=2` does; None for a folder that is no partition's."""
    pairs = [tuple(part.split("=", 1)) for part in folder.parts]
    names = [pair[0] for pair in pairs]
    if any(len(pair) < 2 for pair in pairs) or names != [k for k in PARTITION_KEYS[table] if k in names]:
        return None
    if not all(pair[1].isdecimal() for pair in pairs if pair[0] in ("round", "step")):
        return None
    return tuple((k, int(v) if k in ("round", "step") else v) for k, v in pairs)


# ---------------------------------------------------------------- SQL
@cache
def sql(name: str) -> str:
    """The text of a query under pipeline/sql, for example `grade` or `report/rewards`."""
    return (Path(__file__).parent / "sql" / f"{name}.sql").read_text()


def open_views(*runs: Path) -> "duckdb.DuckDBPyConnection":
    """An in-memory DuckDB with one view for each table over its complete partitions. For the stages' own queries.

    Several runs share the views: their rows have a first column `run`, the folder's name (its path where names are alike).
    """
    con = database()
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else [str(run) for run in runs]

    def view(name: str, table: str, files: Callable[[Path], dict[Path, int]]) -> None:
        _view(con, name, table, {told if runs[1:] else None: files(run) for told, run in zip(names, runs, strict=True)})

    for table in TABLES:
        view(table, table, partial(_listed, table))
    old = "superseded/score/**/part-*.parquet"
    view(
        "score_versions", "scores", lambda run: dict.fromkeys(sorted(run.glob(old)), SCHEMA_VERSION) | _listed("scores", run)
    )
    return con


def named_views(runs: Mapping[str, Path], tables: Iterable[str]) -> "duckdb.DuckDBPyConnection":
    """The same of many runs, which the caller names in column `run`: one scan a table, not one for each run."""
    con = database()
    for table in tables:
        of = {str(path): (name, version) for name, run in runs.items() for path, version in _listed(table, run).items()}
        con.register(
            f"{table}_files", pa.table({"filename": [*of], "run": pa.array([name for name, _ in of.values()], pa.string())})
        )
        selects = []
        for version in sorted({version for _, version in of.values()}):
            paths = ", ".join(_quoted(path) for path, (_, v) in of.items() if v == version)
            selects.append(
                f"select {table}_files.run, rows.* exclude (filename){_counted(table, version)} "
                f"from read_parquet([{paths}], hive_partitioning=false, filename=true) as rows inner join {table}_files using (filename)"
            )
        if selects:
            con.execute(f"create view {table} as {' union all by name '.join(selects)}")
        else:
            con.register(table, ARROW[table].insert(0, pa.field("run", pa.string())).empty_table())
    return con


def _counted(table: str, version: int) -> str:
    """What a version lacks of the table's columns, as SQL over those it has."""
    return "".join(f", cast(len({of}) as integer) as {new}" for new, of in lacking(TABLES[table], version).items())


def _listed(table: str, run: Path) -> dict[Path, int]:
    """The listed parts of a run's table with the schema version of each."""
    return {f: version for p in partitions(run, table) for f, version in p.versions().items()}


def view_parts(
    con: "duckdb.DuckDBPyConnection", name: str, paths: list[Path], schema: pa.Schema, options: str = "union_by_name=true"
) -> None:
    """A view over Parquet files of this schema, in the place of one that has this name."""
    con.execute(f"drop view if exists {name}")
    if paths:
        listed = ", ".join(map(_quoted, paths))
        con.execute(f"create view {name} as from read_parquet([{listed}], hive_partitioning=false, {options})")
    else:
        con.register(name, schema.empty_table())


def ask(con: "duckdb.DuckDBPyConnection", text: str, **parameters: object) -> pa.Table:
    """The whole result of one query as Arrow."""
    return con.sql(text, params=parameters or None).to_arrow_table()


def stream(
    con: "duckdb.DuckDBPyConnection", text: str, rows: int = ROW_GROUP_OF_KEYS, /, **parameters: object
) -> pa.RecordBatchReader:
    """The result of one query as it comes, in batches of so many rows. The connection can do nothing else before its end."""
    return con.sql(text, params=parameters or None).to_arrow_reader(rows)


def _view(con: "duckdb.DuckDBPyConnection", name: str, table: str, files: dict[str | None, dict[Path, int]]) -> None:
    """A view over parts, given with their schema versions by run; what older versions lack is computed from what they have."""
    selects = []
    for run, versions in files.items():
        for version in sorted(set(versions.values())):
            paths = ", ".join(_quoted(path) for path, of in versions.items() if of == version)
            ours = "" if run is None else f"{_quoted(run)} as run, "
            selects.append(f"select {ours}*{_counted(table, version)} from read_parquet([{paths}], hive_partitioning=false)")
    if selects:
        con.execute(f"create view {name} as {' union all by name '.join(selects)}")
    else:
        schema = ARROW[table] if None in files else ARROW[table].insert(0, pa.field("run", pa.string()))
        con.register(name, schema.empty_table())  # not a DuckDB table, which a select could insert into


def _quoted(text: object) -> str:
    return "'" + str(text).replace("'", "''") + "'"


def need_run(run: Path) -> None:
    """UserError if the folder is no run."""
    if not (run / "recipe.toml").exists():
        raise UserError(f"{run}: not a run folder (no recipe.toml in it). A run begins with `dypo ingest RECIPE.toml`")


def connect(*runs: Path | str) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection with one read-only view for each table of the runs; nothing outside them can be reached.

    UserError if a folder is no run or a listed part is missing or truncated.
    """
    roots = [Path(run).resolve() for run in runs]
    for run, root in zip(runs, roots, strict=True):
        if roots.count(root) > 1:
            raise UserError(f"{run}: the same run is named twice")
        need_run(Path(run))
    con = open_views(*roots)
    con.execute(f"set allowed_directories = [{', '.join(_quoted(f'{root}/') for root in roots)}]")
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")
    return con


HELD = "DYPO_RUN_HELD"


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """One writer at a time. UserError at once if another dypo process is writing to this run.

    A process started by the one that holds the lock (HELD names the run) works under it.
    """
    if os.environ.get(HELD) == str(run):
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        f = open(run / ".lock", "a+")  # noqa: SIM115  closed below
    except OSError as e:
        raise UserError(
            f"{run}: the run folder cannot be written to ({e.strerror}). Choose another with --set run=..."
        ) from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            raise UserError(
                f"{run}: another dypo process ({f.read().strip()}) is writing to this run; wait for it"
            ) from None
        f.truncate(0)
        f.write(f"pid {os.getpid()}")
        f.flush()
        yield
