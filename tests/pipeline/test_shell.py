"""`dypo sql` as a person at a terminal and as a script meet it; a folder with a recipe.toml is run enough."""

import contextlib
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.shell import query
from pipeline.stage import Spec, make_table
from pipeline.store import connect, partition
from schemas.errors import UserError
from schemas.tables import ARROW
from tests.tiny_runs import ROOT, dypo

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


@pytest.mark.parametrize(
    "text",
    [
        "copy (select 1) to '{run}/x.csv'",
        "explain analyze copy (select 1) to '{run}/x.csv'",
        "export database '{run}/x'",
        "attach '{run}/x.db'",
        "attach '{run}/x.db' as x; create table x.t as select 1",
        "select 1; copy (select 1) to '{run}/x.csv'",
        "with x as (insert into metrics by name (select 1 as step) returning step) from x",
        "from query('copy (select 1) to ''{run}/x.csv''')",
        "create table x as select 1",
        "drop table metrics",
        "set threads = 1",
        "set enable_external_access = true",
        "pragma enable_profiling",
        "install httpfs",
        "load httpfs",
        "call pragma_version()",
        "from read_text('{outside}/secret')",
        "from read_text('{run}/../secret')",
        "from read_text('{run}/link')",
        "from read_csv('{outside}/secret')",
        "from glob('{outside}/*')",
        "from read_parquet('http://127.0.0.1:1/x.parquet')",
        "select getenv('HOME')",
    ],
)
def test_nothing_is_written_attached_or_read_outside_the_run(tmp_path: Path, text: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").touch()
    (tmp_path / "secret").write_text("outside")
    (run / "link").symlink_to(tmp_path / "secret")
    before = sorted(tmp_path.rglob("*"))
    rows: list = []
    with contextlib.suppress(UserError):
        rows = query(connect(run), text.format(run=run, outside=tmp_path)).to_pylist()
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    assert rows == [], "something was read"


def test_a_query_that_would_run_for_ever_is_stopped_with_exit_code_1(run: Path) -> None:
    began = time.monotonic()
    got = dypo("sql", run, ENDLESS, "--timeout", 0.5, check=False)
    assert time.monotonic() - began < 20
    assert got.returncode == 1
    assert "no result within 0.5 s, so it was stopped; --timeout sets another limit" in got.stderr


def test_one_query_over_two_runs_tells_them_apart(tmp_path: Path) -> None:
    for name, steps in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").touch()
        part = partition(tmp_path / name, "metrics", {"round": 0})
        rows = [{"round": 0, "step": s, "name": "loss/total", "value": 0.5, "when": 0.0} for s in range(steps)]
        make_table(Spec("train", part, {}, {}, 0), pa.Table.from_pylist(rows, schema=ARROW["metrics"]))
    text = "select run, count(*) as n from metrics group by run order by run"
    got = dypo("sql", tmp_path / "a", text, "--with", tmp_path / "b", "--json").stdout
    assert [json.loads(line) for line in got.splitlines()] == [{"run": "a", "n": 1}, {"run": "b", "n": 2}]
    con = connect(tmp_path / "a", tmp_path / "b")
    assert query(con, "select run from rollouts").to_pylist() == []
    assert "run" not in query(connect(tmp_path / "a"), "from metrics").column_names
    with pytest.raises(UserError, match=r"c: not a run folder"):
        connect(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="the same run is named twice"):
        connect(tmp_path / "a", tmp_path / "a")
