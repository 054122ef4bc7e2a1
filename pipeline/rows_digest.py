"""schemas.ids.rows_digest of a partition's parts, however many rows they have.

One idea: DuckDB sorts the keys (on disk where memory ends) and they come as a stream; each batch becomes the canonical JSON
that the digest is over, column by column in Arrow, and goes into one sha256. A key that stands twice is found on the way.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.interrupts import database
from schemas.tables import TABLES

BATCH = 1 << 17
MEMORY_MB, ROWS_PER_MB = 128, 100_000  # DuckDB cannot merge more sorted runs than it has room for (130,000 were measured)


def digest_parts(paths: list[Path], table: str) -> str:
    """The digest of the sorted keys and contents. AssertionError if a key stands twice: that is a defect of ours."""
    declared = TABLES[table]
    columns = [*declared.key, *declared.content]
    whole, before = hashlib.sha256(b"["), None
    for batch in sorted_rows(paths, columns, declared.key):
        if batch.num_rows == 0:
            continue
        keys = _joined([_json(batch.column(name)) for name in declared.key])
        if keys[0].as_py() == before or pc.call_function("any", [pc.call_function("equal", [keys[1:], keys[:-1]])]).as_py():
            raise AssertionError(f"{paths[0].parent}: a key of {table} stands twice; this is a bug in dypo")
        text = _joined([_json(batch.column(name)) for name in columns]) if declared.content else keys
        whole.update(b"," if before is not None else b"")
        whole.update(_line(text))
        before = keys[-1].as_py()
    whole.update(b"]")
    return whole.hexdigest()


def digest_column(batches: Iterable[pa.Array]) -> str:
    """schemas.ids.digest of one column's values as a list."""
    whole, first = hashlib.sha256(b"["), True
    for batch in batches:
        if len(batch):
            whole.update(b"" if first else b",")
            whole.update(_line(_json(batch)))
            first = False
    whole.update(b"]")
    return whole.hexdigest()


def sorted_rows(
    paths: list[Path], columns: Iterable[str], key: Iterable[str], where: str = "true"
) -> Iterable[pa.RecordBatch]:
    """Columns of parts in the order of their key, as a stream, sorted on disk: a megabyte for each ROWS_PER_MB, past the first."""
    if not paths:
        return []

    memory = max(MEMORY_MB, sum(pq.read_metadata(path).num_rows for path in paths) // ROWS_PER_MB)
    spill = str(paths[0].parent / ".sort.tmp")
    con = database(memory_limit=f"{memory}MB", threads=1, temp_directory=spill)
    names, keys = (", ".join(f'"{c}"' for c in each) for each in (columns, key))
    source = "read_parquet($paths, hive_partitioning=false, union_by_name=true)"
    query = f"select {names} from {source} where {where} order by {keys}"
    return con.sql(query, params={"paths": [str(p) for p in paths]}).to_arrow_reader(BATCH)


def _joined(columns: list[pa.Array]) -> pa.Array:
    """JSON values as the JSON list of each row."""
    inner = pc.call_function("binary_join_element_wise", [*columns, pa.scalar(",")])
    return pc.call_function("binary_join_element_wise", [pa.scalar("["), inner, pa.scalar("]"), pa.scalar("")])


def _line(texts: pa.Array) -> bytes:
    """The texts with commas between them."""
    one = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    return pc.call_function("binary_join", [one, pa.scalar(",")])[0].as_buffer().to_pybytes()


def _json(column: pa.Array) -> pa.Array:
    """Each value as json.dumps has it. Texts without a character that JSON escapes only get their quotes."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        text: Any = column.cast(pa.string())
    elif pa.types.is_string(kind) and not _escaped(column):
        quote = pa.scalar('"')
        text = pc.call_function("binary_join_element_wise", [quote, column, quote, pa.scalar("")])
    else:
        values = column.dictionary_encode()
        told = [
            None if v is None else json.dumps(v, ensure_ascii=False, allow_nan=False) for v in values.dictionary.to_pylist()
        ]
        text = pa.array(told, pa.string()).take(values.indices)
    return text.fill_null("null")


def _escaped(column: pa.Array) -> bool:
    if pc.call_function("all", [pc.call_function("ascii_is_alnum", [column])]).as_py():  # ids: the quicker look
        return False
    found = pc.call_function("match_substring_regex", [column], pc.MatchSubstringOptions(r'["\\\x00-\x1f]'))
    return bool(pc.call_function("any", [found]).as_py())
