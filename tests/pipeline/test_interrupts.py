"""A Ctrl-C is noticed whatever the main thread is busy with, and nothing else is taken for one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import duckdb
import pytest

from pipeline import interrupts
from pipeline.interrupts import Interrupts, database
from pipeline.store import ask


@pytest.fixture
def listening() -> Iterator[Interrupts]:
    yield Interrupts()
    signal.set_wakeup_fd(-1)


def test_a_ctrl_c_is_noticed_and_python_s_own_handler_stays(listening: Interrupts) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "asyncio asks the same"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert listening.recent()


def test_without_one_there_was_none(listening: Interrupts) -> None:
    assert not listening.recent()


def test_one_of_long_ago_explains_nothing(listening: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "RECENT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not listening.recent()


@pytest.mark.parametrize("threads", [1, 2])
def test_it_stops_a_query_of_any_number_of_threads(listening: Interrupts, threads: int) -> None:
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with suppress(KeyboardInterrupt):  # Python may get to raise it only after DuckDB has raised its own
        with pytest.raises((KeyboardInterrupt, RuntimeError, duckdb.Error)):
            ask(database(threads=threads), "select sum(i * i::double) from range(1000000000000) as t(i)")  # for days
        time.sleep(0.1)
    assert listening.recent()
