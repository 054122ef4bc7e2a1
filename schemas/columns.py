"""Declares a column once; Arrow schema, DuckDB type and Markdown are rendered from the declaration.

Types are Arrow's. The few shapes that tables use (scalars, lists, lists of structs) are all that is rendered
for DuckDB; anything else raises, so a new shape is added here on purpose.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 2  # schemas/migrations.py says what older ones lack
META_TABLE = b"dypo.table"
META_VERSION = b"dypo.schema_version"

_DUCKDB = {
    pa.string(): "VARCHAR",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
}


def duckdb_type(kind: pa.DataType) -> str:
    """The DuckDB type that holds the same values as an Arrow type; KeyError for a shape no table uses."""
    if pa.types.is_list(kind):
        return duckdb_type(kind.value_type) + "[]"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f'"{f.name}" {duckdb_type(f.type)}' for f in kind) + ")"
    return _DUCKDB[kind]


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, one sentence of documentation, and whether it may be null.

    counts: the list column whose length it is. The store fills it, so that a query about lengths reads no list.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    counts: str | None = None


@dataclass(frozen=True)
class Table:
    """One table: what a row is (grain), its unique key, the columns that name its partitions, its columns.

    Partition columns are in the files too, so a stray file says all by itself. `content` names columns that a row made
    again under the same key might hold otherwise (a teacher's server answers anew), and that others depend on.
    """

    name: str
    grain: str
    key: tuple[str, ...]
    partitions: tuple[str, ...]
    columns: tuple[Column, ...]
    content: tuple[str, ...] = ()

    def arrow(self) -> pa.Schema:
        """The Arrow schema, nullability included, stamped with the table's name and schema version."""
        return pa.schema(
            [pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns],
            metadata={META_TABLE: self.name.encode(), META_VERSION: str(SCHEMA_VERSION).encode()},
        )

    def counted(self, rows: pa.Table) -> pa.Table:
        """The rows with every column that counts a list's elements filled from that list."""
        for c in self.columns:
            if c.counts is not None and c.counts in rows.column_names:
                lengths = pc.call_function("list_value_length", [rows.column(c.counts)]).cast(c.type)
                at = rows.column_names.index(c.name) if c.name in rows.column_names else rows.num_columns
                rows = rows.drop_columns([c.name]) if at < rows.num_columns else rows
                rows = rows.add_column(at, pa.field(c.name, c.type), lengths)
        return rows

    def duckdb_columns(self) -> str:
        """Column list for `create table`, used for tables that have no rows yet."""
        return ", ".join(f'"{c.name}" {duckdb_type(c.type)}' for c in self.columns)

    def markdown(self) -> str:
        """This table's section of docs/data.md."""
        lines = [f"## {self.name}", "", f"One row: {self.grain}. Key: ({', '.join(self.key)})."]
        where = "/".join([self.name, *(f"{p}=..." for p in self.partitions)])
        lines += [f"Folder: `RUN/{where}/`.", "", "| column | type | null | meaning |", "|---|---|---|---|"]
        for c in self.columns:
            doc = c.doc.replace("|", "\\|")
            lines.append(f"| {c.name} | {duckdb_type(c.type)} | {'yes' if c.nullable else ''} | {doc} |")
        return "\n".join(lines) + "\n"
