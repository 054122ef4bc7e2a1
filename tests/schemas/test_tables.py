"""A column is declared once; everything rendered from it agrees."""

import duckdb
import pyarrow as pa
import pytest

from schemas.columns import META_TABLE
from schemas.tables import ARROW, TABLES


@pytest.mark.parametrize("name", TABLES)
def test_duckdb_reads_the_types_that_it_was_told(name: str) -> None:
    con = duckdb.connect()
    con.execute(f"create table declared ({TABLES[name].duckdb_columns()})")
    con.register("empty", ARROW[name].empty_table())
    con.execute("create table seen as select * from empty")
    types = "select column_name, data_type from duckdb_columns() where table_name = $t order by column_index"
    assert con.execute(types, {"t": "declared"}).fetchall() == con.execute(types, {"t": "seen"}).fetchall()


@pytest.mark.parametrize("name", TABLES)
def test_keys_and_partition_columns_are_columns(name: str) -> None:
    table = TABLES[name]
    columns = [c.name for c in table.columns]
    assert len(set(columns)) == len(columns)
    assert {*table.key, *table.partitions} <= set(columns)
    assert ARROW[name].metadata[META_TABLE] == name.encode()


def test_a_type_that_no_table_uses_is_not_rendered_by_accident() -> None:
    from schemas.columns import duckdb_type

    with pytest.raises(KeyError):
        duckdb_type(pa.date32())
