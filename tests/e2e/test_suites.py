"""Shipped suites through the real command: every benchmark's schema to prompts, and the tiny world's sets to metrics."""

from collections import Counter, defaultdict
from pathlib import Path

import polars as pl
import pytest

from pipeline.statistics import maj_at_n
from tests.tiny_runs import ROOT, dypo, table, write_recipe

BENCHMARKS = ("aime24", "aime25", "amc", "math500", "minerva", "arc_c", "gpqa_diamond")


def including(folder: Path, *suites: str) -> Path:
    names = ", ".join(f'"{ROOT}/recipes/suites/{suite}.toml"' for suite in suites)
    return write_recipe(folder, **{"rounds = 2": f"rounds = 2\ninclude = [{names}]"})


def test_every_benchmark_goes_into_one_run_whose_recipe_is_whole(tmp_path: Path) -> None:
    found = {path.stem: path for path in (ROOT / "data" / "suites").iterdir() if path.suffix != ".md"}
    paths = [word for name in BENCHMARKS for word in ("--set", f"sources.{name}.path='{found[name]}'")]
    dypo("ingest", including(tmp_path, *BENCHMARKS, "reasoning_gym"), *paths)
    prompts = table(tmp_path / "run", "prompts").filter(pl.col("split") == "eval")
    counts = dict(prompts.group_by("source").len().iter_rows())
    assert {name: counts[name] for name in BENCHMARKS} == dict(zip(BENCHMARKS, (3, 3, 3, 4, 3, 4, 3), strict=True))
    gym = {name: n for name, n in counts.items() if name.startswith("gym")}
    assert gym == {
        "gym_algebra": 149,
        "gym_arithmetic": 199,
        "gym_logic": 150,
    }  # one repeated question each in the first two
    assert set(prompts.filter(pl.col("source") != "fresh")["messages"].list.first().struct.field("role")) == {"system"}
    assert "include" not in (tmp_path / "run" / "recipe.toml").read_text()
    assert "to do" in dypo("plan", tmp_path / "run").stdout


def test_a_benchmark_that_is_not_there_says_where_it_would_come_from(tmp_path: Path) -> None:
    nowhere = tmp_path / "eval" / "aime24.parquet"
    got = dypo("ingest", including(tmp_path, "aime24"), "--set", f"sources.aime24.path='{nowhere}'", check=False)
    assert got.returncode == 2
    assert "hub = 'HuggingFaceH4/aime_2024/" in got.stderr
    assert f"put the file at {nowhere} yourself" in got.stderr
    planned = dypo("plan", including(tmp_path, "aime24"), "--set", f"sources.aime24.path='{nowhere}'")
    assert "not there yet" in " ".join(planned.stdout.split())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    path = including(folder, "tiny")
    few = [word for kind in ("id", "shift", "sub") for word in ("--set", f"eval.suites.tiny_{kind}.limit=10")]
    dypo("ingest", path, *few)
    dypo("eval", path, *few, "--set", "eval.suites.tiny_sub.temperature=1.0")
    return folder / "run"


def test_a_suite_is_sampled_as_it_says_and_else_as_eval_says(evaluated: Path) -> None:
    sampled = table(evaluated, "eval_rollouts").group_by("suite").agg(pl.col("temperature").unique(), pl.len())
    assert {suite: (t, n) for suite, t, n in sampled.iter_rows()} == {
        "id": ([0.6], 24), "tiny_id": ([0.6], 40), "tiny_shift": ([0.6], 40), "tiny_sub": ([1.0], 40),
    }  # fmt: skip


def test_maj_at_n_is_the_vote_over_stored_verdicts(evaluated: Path) -> None:
    evals = {(r["suite"], r["metric"]): r for r in table(evaluated, "evals").to_dicts()}
    assert {metric for suite, metric in evals if suite == "tiny_id"} == {"avg@4", "pass@1", "pass@4", "maj@4"}
    assert ("id", "maj@2") not in evals
    for suite in ("tiny_id", "tiny_shift", "tiny_sub"):
        said = defaultdict(list)
        for r in table(evaluated, "scores").filter(pl.col("suite") == suite).iter_rows(named=True):
            said[r["prompt_id"]].append((r["extracted"], r["correct"]))
        assert Counter(map(len, said.values())) == {4: 10}
        votes = [maj_at_n([a for a, _ in of], [c for _, c in of]) for of in said.values()]
        row = evals[suite, "maj@4"]
        assert row["value"] == pytest.approx(sum(votes) / 10)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["ci_low"] < row["ci_high"]


def test_a_policy_template_makes_other_rollouts_and_needs_leave(evaluated: Path, tmp_path: Path) -> None:
    got = dypo("eval", evaluated, "--set", "policy.template='{problem}='", check=False)
    assert got.returncode == 2
    assert "template: None -> '{problem}='" in got.stderr
