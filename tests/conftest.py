"""Fixtures that more than one folder of tests uses."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import synthetic_run

if TYPE_CHECKING:
    import duckdb

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def synthetic() -> "Iterator[duckdb.DuckDBPyConnection]":
    """A DuckDB connection with one view per table of a made-up run (tests/synthetic_run.py)."""
    con = synthetic_run.connect(synthetic_run.build_tables())
    yield con
    con.close()
