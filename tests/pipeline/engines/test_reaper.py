"""Processes that must not outlive the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_runs import ROOT

OWNER = """
import subprocess, sys, time
from pipeline.engines import reaper
child = subprocess.Popen([sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"])
time.sleep(1)
kept = reaper.watch([child.pid])
print(*reaper.descendants(child.pid), flush=True)
if sys.argv[1] == "wait":
    time.sleep(300)
if sys.argv[1] == "call it off":
    kept.kill(); kept.wait()
"""


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def owner(how: str) -> tuple["subprocess.Popen[str]", list[int]]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    with process.stdout:
        pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("how", ["wait", "end"])
def test_an_engine_goes_with_the_process_that_started_it_however_that_ends(how: str) -> None:
    process, pids = owner(how)
    if how == "wait":
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(pids)


def test_a_reaper_that_is_called_off_kills_nothing() -> None:
    process, pids = owner("call it off")
    process.wait()
    time.sleep(1)
    assert all(map(alive, pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
