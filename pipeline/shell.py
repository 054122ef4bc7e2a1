"""`dypo sql`: one SELECT over the run's views, or an interactive prompt. Nothing can be written or reached from it."""

import contextlib
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.store import ask, connect
from schemas.errors import UserError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


def query(con: "duckdb.DuckDBPyConnection", text: str, timeout_s: float | None = None) -> "pa.Table":
    """The result of exactly one SELECT. UserError for anything else (COPY, ATTACH, SET, several statements) and bad SQL."""
    import duckdb

    try:
        statements = con.extract_statements(text)
    except duckdb.Error as e:
        raise UserError(f"sql: {e}") from None
    if len(statements) != 1 or statements[0].type.name != "SELECT":
        kinds = ", ".join(s.type.name for s in statements) or "nothing"
        raise UserError(
            f"sql: one SELECT is allowed (describe, show and summarize count as one), found {kinds}. The run is read-only"
        )
    timer = threading.Timer(timeout_s, con.interrupt) if timeout_s else None
    try:
        if timer:
            timer.start()
        return ask(con, text)
    except duckdb.Error as e:
        raise UserError(f"sql: {e}") from None
    finally:
        if timer:
            timer.cancel()


def show(table: "pa.Table", as_json: bool, limit: int = 200) -> None:
    """Prints a result: aligned for people, one JSON object a line for scripts (all rows)."""
    if as_json:
        for row in table.to_pylist():
            print(json.dumps(row, ensure_ascii=False, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in table.column_names:
        view.add_column(name, overflow="fold")
    for row in table.slice(0, limit).to_pylist():
        view.add_row(*(escape(_cell(v)) for v in row.values()))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(view)
    more = f", first {limit} shown (--json prints all)" if table.num_rows > limit else ""
    print(f"({table.num_rows} rows{more})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 12:
        return "[" + ", ".join(_cell(v) for v in value[:12]) + f", ... {len(value)}]"
    return "" if value is None else str(value)


def interactive(run: Path, as_json: bool) -> None:
    """Reads statements that end with `;` until end of input or `.quit`. `.tables` lists the views."""
    con = connect(run)
    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    if sys.stdin.isatty():
        print("Read-only. End a query with ;   .tables lists the views   .quit leaves")
    buffer = ""
    while True:
        try:
            line = input("dypo> " if not buffer else "  ... ") if sys.stdin.isatty() else input()
        except EOFError:
            break
        if not buffer and line.strip() in (".quit", ".exit", "quit", "exit"):
            break
        if not buffer and line.strip() == ".tables":
            line = "select view_name as name from duckdb_views() where not internal union select table_name from duckdb_tables() order by all;"
        buffer += line + "\n"
        if not buffer.strip():
            buffer = ""
        elif buffer.rstrip().endswith(";"):
            try:
                show(query(con, buffer), as_json)
            except UserError as e:
                print(e, file=sys.stderr)
            buffer = ""
    if buffer.strip():
        show(query(con, buffer), as_json)
