"""`dypo sql`: one SELECT over the run's views, or an interactive prompt. Nothing can be written or reached from it."""

import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from pipeline.store import ask
from schemas.errors import DypoError, UserError, WorkError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

HELP = "Read-only. End a query with ;   .tables lists the views   .quit leaves   Ctrl-C drops a query"
TABLES = "select view_name as name from duckdb_views() where not internal union select table_name from duckdb_tables() order by all"


def query(con: "duckdb.DuckDBPyConnection", text: str, timeout: float | None = None) -> "pa.Table":
    """The result of exactly one SELECT. UserError for anything else (COPY, ATTACH, SET, several statements) and bad SQL.

    WorkError if there is none within `timeout` seconds.
    """
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
    with ThreadPoolExecutor(1) as pool:  # beside this thread, which stays free to take a Ctrl-C
        running = pool.submit(ask, con, text)
        try:
            return running.result(timeout)
        except (KeyboardInterrupt, TimeoutError) as e:
            while not running.done():  # an interrupt that comes while a query is planned is lost
                con.interrupt()
                wait([running], 0.05)
            if isinstance(e, TimeoutError):
                raise WorkError(
                    f"sql: no result within {timeout:g} s, so it was stopped; --timeout sets another limit"
                ) from None
            raise
        except duckdb.Error as e:
            raise UserError(f"sql: {e}") from None


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


def interactive(con: "duckdb.DuckDBPyConnection", as_json: bool, timeout: float) -> None:
    """Reads statements that end with `;` until end of input or `.quit`. `.tables` lists the views.

    On a terminal a mistake is told and Ctrl-C drops what was typed, or stops the query; from a pipe a mistake ends it.
    """
    terminal = sys.stdin.isatty()
    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    if terminal:
        print(HELP)
    buffer = ""
    while True:
        try:
            line = input(("  ... " if buffer else "dypo> ") if terminal else "")
            word = "" if buffer else line.strip().removesuffix(";")
            if word in (".quit", ".exit", "quit", "exit"):
                break
            if word == ".tables":
                line = f"{TABLES};"
            elif word.startswith("."):
                print(HELP)
                continue
            buffer = f"{buffer}{line}\n" if (buffer + line).strip() else ""
            if buffer.rstrip().endswith(";"):
                text, buffer = buffer, ""
                show(query(con, text, timeout), as_json)
        except EOFError:
            break
        except DypoError as e:
            if not terminal:
                raise
            print(e, file=sys.stderr)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            buffer = ""
    if buffer.strip():
        show(query(con, buffer, timeout), as_json)
