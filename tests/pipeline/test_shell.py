"""`dypo sql` as a person at a terminal and as a script meet it; a folder with a recipe.toml is run enough."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.tiny_runs import ROOT

ENDLESS = "select count(*) from range(1000000000000);"


class Terminal:
    """The interactive prompt on a terminal of its own."""

    def __init__(self, run: Path) -> None:
        self.parent, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "sql", str(run)], stdin=child, stdout=child, stderr=child, cwd=ROOT,
            start_new_session=True, preexec_fn=self._own_terminal,
        )  # fmt: skip
        os.close(child)

    @staticmethod
    def _own_terminal() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, keys: str) -> None:
        os.write(self.parent, keys.encode())

    def until(self, pattern: str, seconds: float = 30) -> str:
        """What was shown up to the pattern."""
        shown, end = "", time.monotonic() + seconds
        os.set_blocking(self.parent, False)
        while time.monotonic() < end:
            try:
                shown += os.read(self.parent, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
            if re.search(pattern, shown):
                return shown
        pytest.fail(f"no {pattern!r} in {shown!r}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").touch()
    return tmp_path


@pytest.fixture
def terminal(run: Path):
    it = Terminal(run)
    yield it
    it.process.kill()
    it.process.wait()
    os.close(it.parent)


def test_ctrl_c_drops_what_was_typed_or_stops_the_query_and_the_prompt_goes_on(terminal: Terminal) -> None:
    terminal.until("dypo> ")
    terminal.type("select 1 fr")
    terminal.until("fr")
    terminal.type("\x03")
    terminal.until("dypo> ")
    terminal.type(ENDLESS + "\n")
    terminal.until(";")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("dypo> ")
    terminal.type("select 40 + 2;\n")
    assert "42" in terminal.until("dypo> ")
    terminal.type("exit;\n")
    assert terminal.process.wait(30) == 0


def test_a_mistake_or_an_unknown_dot_word_is_told_and_the_prompt_goes_on(terminal: Terminal) -> None:
    terminal.until("dypo> ")
    terminal.type("selec 1;\n")
    assert "sql: Parser Error" in terminal.until(r"Error(.|\n)*dypo> ")
    terminal.type(".help\n")
    assert ".tables lists the views" in terminal.until(r"leaves(.|\n)*dypo> ")
    terminal.type("select\n")
    terminal.until(r"  \.\.\. ")
    terminal.type("7 * 6;\n")
    assert "42" in terminal.until("dypo> ")


def test_a_mistake_from_a_pipe_ends_a_script_with_exit_code_2(run: Path) -> None:
    got = subprocess.run(
        [sys.executable, "-m", "pipeline", "sql", str(run)],
        input=".tables\nselect 40\n+ 2;\nbad;\nselect 77;\n", capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert got.returncode == 2
    assert "rollouts" in got.stdout
    assert "42" in got.stdout
    assert "77" not in got.stdout
    assert got.stderr.startswith("error: sql:")
