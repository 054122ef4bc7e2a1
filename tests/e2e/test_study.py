"""`dypo study` by the real command: killed and gone on with, its cells as `dypo run` makes them, a failure among them."""

import os
import shutil
import time
from pathlib import Path

import pytest

from schemas.tables import TABLES
from tests.tiny_runs import ROOT, dypo, kill_when, table, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a minute on an idle machine

STUDY = """
name = "small"
title = "A small study"
folder = "{folder}/study"
seeds = [3]
references = ["grpo"]
probe = {{ method = "dypo", seed = 3, rounds = [0] }}

[[worlds]]
name = "w"
recipe = "{folder}/small.toml"
rollout_tokens = 6000
bases = {{ a = "{root}/data/tiny_policy" }}

[tuning]
base = "a"
seed = 100
suite = "validation"
trials = [{{ lr = 1e-3 }}]

[[methods]]
name = "dypo"
method = {{ type = "dypo" }}
teachers = ["left"]

[[methods]]
name = "grpo"
method = {{ type = "grpo" }}

[[methods]]
name = "cut"
method = {{ type = "dypo" }}
set = {{ rollouts = {{ max_tokens = 4 }}, score = {{ max_truncated = 0.0 }} }}
"""
SUITES = """suites = [
    { name = "validation", sources = ["fresh"], n = 1, pass_k = [1], every_rounds = 1 },
    { name = "id", sources = ["fresh"], n = 2, pass_k = [1, 2] },
]"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed in the middle of its first result, run again to its end, and once more."""
    folder = tmp_path_factory.mktemp("study")
    text = write_recipe(folder).read_text()
    (folder / "small.toml").write_text(text[: text.index("suites =")] + SUITES + "\n")
    (folder / "study.toml").write_text(STUDY.format(folder=folder, root=ROOT))
    cell = folder / "study" / "cells" / "w" / "a" / "dypo" / "3"
    begun = cell / "rollouts" / "round=1"
    assert kill_when(["study", folder / "study.toml"], lambda: any(begun.glob("part-*.parquet"))), "it ended too soon"
    assert not (begun / "manifest.json").exists()
    _wait_until_free(cell)
    killed = dypo("study", folder / "study.toml", check=False)
    assert killed.returncode == 1, killed.stderr
    (folder / "told.txt").write_text(killed.stdout + killed.stderr)
    return folder


def _wait_until_free(run: Path) -> None:
    """The process that wrote to the run goes with the study, if not in the same instant."""
    pid = int((run / ".lock").read_text().split()[1])
    for _ in range(200):
        if not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived the study that started it")


def test_a_killed_study_goes_on_and_its_results_are_what_a_plain_run_gives(folder: Path, tmp_path: Path) -> None:
    cell = folder / "study" / "cells" / "w" / "a" / "dypo" / "3"
    recipe = (folder / "study" / "recipes" / "cells" / "w" / "a" / "dypo" / "3.toml").read_text()
    (tmp_path / "plain.toml").write_text(recipe.replace(str(cell), str(tmp_path / "plain")))
    dypo("run", tmp_path / "plain.toml")
    for name in TABLES:
        mine, plain = table(cell, name), table(tmp_path / "plain", name)
        if name in ("evals", "eval_rollouts", "scores"):  # the study evaluated once more, for its token budget
            mine = mine.join(plain.select(TABLES[name].key), on=TABLES[name].key, how="semi", nulls_equal=True)
        assert mine.sort(*TABLES[name].key).equals(plain), name
    assert not list(cell.rglob(".*.tmp"))


def test_every_method_began_with_the_very_same_files_of_round_0(folder: Path) -> None:
    study = folder / "study"
    stem, cells = study / "stems/w/a/3", [study / f"cells/w/a/{m}/3" for m in ("dypo", "grpo")]
    for name in ("rollouts/round=0", "scores/kind=rollout/round=0", "prompts", "traces/teacher=left"):
        for path in sorted((stem / name).glob("part-*.parquet")):
            assert {(cell / name / path.name).stat().st_ino for cell in cells} == {path.stat().st_ino}, path
    assert not (cells[0] / "traces/teacher=noisy").exists()
    dypo("verify", stem)
    for cell in cells:
        dypo("verify", cell)


def test_a_result_that_fails_is_told_with_its_log_and_the_rest_goes_on(folder: Path) -> None:
    told = (folder / "told.txt").read_text()
    assert "cells/w/a/cut/3: failed" in told
    assert "score.max_truncated" in told
    assert "cells/w/a/grpo/3: done" in told
    assert "1 of 4 runs failed" in told
    page = (folder / "study" / "small.md").read_text()
    assert "2 of 3 results" in page
    assert "0 of 1 | missing" in page


def test_what_is_finished_is_not_run_again(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "study" / "cells").rglob("*") if p.is_file()}
    again = dypo("study", folder / "study.toml", "--only", "cells/*/[dg]*")
    assert "3 runs: 3 finished, 0 to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (folder / "study" / "cells").rglob("*") if p.is_file()} == before


def test_the_gradients_were_probed(folder: Path) -> None:
    assert "## Gradient variance" in (folder / "study" / "small.md").read_text()
    assert (folder / "study" / "probes/w/a/dypo-3-round-0.json").exists()


def test_a_result_whose_files_are_gone_is_made_again(folder: Path) -> None:
    shutil.rmtree(folder / "study" / "cells/w/a/grpo/3/evals")
    plan = dypo("study", folder / "study.toml", "--plan", "--only", "cells/*/[dg]*").stdout
    assert "1 of 2 results; 1 runs to do" in plan
    dypo("study", folder / "study.toml", "--only", "cells/*/grpo/*")
    assert (folder / "study" / "cells/w/a/grpo/3/evals").exists()
    assert "2 of 3 results" in (folder / "study" / "small.md").read_text(), "the report is of all that is there"
