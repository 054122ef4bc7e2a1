"""Ends processes when this one ends, however it ends: a killed command must not leave an engine behind that holds a GPU.

One idea: a small process of its own reads from a pipe whose other end only we hold. When we are gone it reads the end of the file, and
kills what it was given, with all that descends from it. Linux; elsewhere it kills the processes alone.

    python reaper.py PID ...
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def watch(pids: Iterable[int]) -> "subprocess.Popen[bytes] | None":
    """The reaper of these processes; None of none. Its `kill` calls it off."""
    words = [str(pid) for pid in pids]
    if not words:
        return None
    return subprocess.Popen([sys.executable, "-I", __file__, *words], stdin=subprocess.PIPE, start_new_session=True)


def descendants(pid: int) -> list[int]:
    """The process and all that come from it, children last."""
    found = [pid]
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += descendants(int(child))
    return found


if __name__ == "__main__":
    sys.stdin.buffer.read()
    for pid in [each for word in sys.argv[1:] for each in descendants(int(word))]:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
