"""Ctrl-C, noticed whatever the main thread is busy with.

Python raises KeyboardInterrupt between two of its own steps. C code in which the Ctrl-C came may put an error of its own in
its place (DuckDB does, as a RuntimeError) or not look for one before it is done (DuckDB's threads).
One idea: Python also writes each signal's number into a pipe at once, and a thread that reads it there stops the queries.
Python's handler stays in its place: asyncio looks for it, and does without its own where it is another.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import duckdb

RECENT_S = 10.0  # an error so soon after a Ctrl-C is taken for its doing

_open: WeakSet[Any] = WeakSet()
_opening = threading.Lock()


def database(**config: Any) -> "duckdb.DuckDBPyConnection":
    """An in-memory DuckDB whose queries a Ctrl-C stops."""
    import duckdb

    con = duckdb.connect(config=config)
    with _opening:
        _open.add(con)
    return con


class Interrupts:
    """Listens from when it is made, in the main thread."""

    def __init__(self) -> None:
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._last = -float("inf")
        self._thread = threading.Thread(target=self._listen, args=[heard], daemon=True)
        self._thread.start()
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def recent(self) -> bool:
        """Whether there was a Ctrl-C in the last seconds. Ends the listening."""
        signal.set_wakeup_fd(-1)
        os.close(self._told)
        self._thread.join()
        return time.monotonic() - self._last < RECENT_S

    def _listen(self, heard: int) -> None:
        while numbers := os.read(heard, 4096):
            if signal.SIGINT in numbers:
                self._last = time.monotonic()
                _stop_queries()


def _stop_queries() -> None:
    with _opening:
        connections = list(_open)
    for con in connections:
        with suppress(Exception):  # closed since
            con.interrupt()
