"""Forked workers that know nothing of the program that started them.

multiprocessing's own forkserver imports the caller's __main__ into every worker: a script without a
__main__ guard would run again, and a caller with torch would load it once per worker. This context
leaves __main__ out, starts a fork server of its own (a fresh interpreter, ended with the pool) and
loads into it what the workers need, so that replacing a killed worker costs milliseconds. POSIX
only, as forkserver is.
"""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, process, reduction, spawn, util
from multiprocessing.context import ForkServerContext, set_spawning_popen
from typing import Any


class CleanForkContext(ForkServerContext):
    """A multiprocessing context for pebble. Call `stop` when the last worker has ended."""

    def __init__(self, preload: Sequence[str]) -> None:
        self.server = forkserver.ForkServer()
        self.server.set_forkserver_preload(list(preload))

    def Process(self, *args: Any, **kwargs: Any) -> "_Process":  # type: ignore[override]
        started = _Process(*args, **kwargs)
        started.server = self.server
        return started

    def stop(self) -> None:
        _stop(self.server)


def _stop(server: Any, at_once: bool = False) -> None:
    """With what is private to multiprocessing, but there since 3.4; without it the server ends with us."""
    if hasattr(server, "_stop"):
        if at_once and server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


class _Process(process.BaseProcess):
    _start_method = "forkserver"
    server: forkserver.ForkServer | None = None

    def _Popen(self, process_obj: "_Process") -> "_Popen":
        return _Popen(process_obj)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "server"}


class _Popen(popen_forkserver.Popen):
    """As the standard one, but for what `_launch` leaves out and the server it asks."""

    _fds: list[int]

    def _launch(self, process_obj: Any) -> None:
        preparation = {
            key: value
            for key, value in spawn.get_preparation_data(process_obj._name).items()
            if key not in {"init_main_from_name", "init_main_from_path", "dir"}
        }
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        try:
            with _ctrl_c_waits():  # the server inherits that: a Ctrl-C in a terminal is for us alone
                self.sentinel, writer = process_obj.server.connect_to_new_process(self._fds)
                parent_writer = os.dup(writer)  # the child sees its parent end by this one closing
                self.finalizer = util.Finalize(self, _close, (parent_writer, self.sentinel))
                with open(writer, "wb") as pipe:
                    pipe.write(message.getbuffer())
            self.pid = forkserver.read_signed(self.sentinel)  # waits while the server loads what the workers need
        except KeyboardInterrupt:  # without this the child would begin when what it is to read is gone
            _stop(process_obj.server, at_once=True)
            raise


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def end_with_the_parent() -> None:
    """Called in a worker: when the program that started it is gone, even by kill -9, so is the worker (Linux)."""
    # The server lives while anyone holds this descriptor; a hung worker must not be the one that does.
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
