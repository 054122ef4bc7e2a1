"""PRISM's alignment round through the real command: ratings as rows, advantages from them, and what a kill or a change costs."""

import json
import math
import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.tiny_runs import RECIPE, dypo, kill_when, table, write_recipe

METHOD = 'method = { type = "dypo", lr = 1e-3 }'
PRISM = 'method = { type = "prism", lr = 1e-3, sft_rounds = 0 }'


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round 0, an alignment round, up to its shards."""
    folder = tmp_path_factory.mktemp("prism")
    path = write_recipe(
        folder, **{METHOD: PRISM, "limit = 12": "limit = 4", "batch_sequences = 40": "batch_sequences = 160"}
    )
    for stage in (["ingest"], ["generate"], ["score"], ["grade"]):
        dypo(*stage, path)
    return folder / "run"


@pytest.fixture
def a_run(graded: Path, tmp_path: Path) -> Path:
    shutil.copytree(graded, tmp_path / "run")
    return tmp_path / "run"


def outcomes(*args: object) -> dict[str, str]:
    return {r["partition"]: r["action"] for r in map(json.loads, dypo(*args, "--json").stdout.splitlines())}


def test_every_rollout_of_a_prompt_with_a_trace_is_rated_and_its_rating_is_the_reward(graded: Path) -> None:
    grades, ratings, shards = (table(graded, name) for name in ("grades", "ratings", "shards"))
    prompts = set(grades.filter(pl.col("traces") > 0)["prompt_id"])
    assert len(set(grades.filter(pl.col("prompt_id").is_in(prompts))["grade"])) > 1
    assert set(ratings["prompt_id"]) == set(shards["prompt_id"]) == prompts
    assert set(ratings["fold"]) == {0, 1}
    assert ratings["model"].n_unique() == 2
    assert ratings.filter(pl.col("kind") == "trace").height == grades["traces"].sum()
    assert ratings.filter(pl.col("kind") == "rollout").height == 4 * len(prompts) == shards.height
    assert set(shards["route"]) == {"rl"}
    score = dict(zip(ratings["item_id"], ratings["score"], strict=True))
    for (_,), group in shards.group_by("prompt_id"):
        scores = [score[i] for i in group["item_id"]]
        assert group["reward"].to_list() == scores
        mean = sum(scores) / 4
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / 3)
        want = [(s - mean) / (std + 1e-6) if std else 0.0 for s in scores]
        assert group["advantage"].to_list() == pytest.approx(want, rel=1e-6, abs=1e-6)
    facts = json.loads((graded / "ratings/round=0/manifest.json").read_text())["facts"]
    assert facts["prompts"] == len(prompts)
    assert 0 <= facts["trace_outscores"] <= 1


def test_graded_again_it_does_nothing_and_another_discriminator_rates_and_routes_anew(a_run: Path) -> None:
    assert set(outcomes("grade", a_run).values()) == {"nothing"}
    before = table(a_run, "ratings")
    changed = ["--set", "train.method.discriminator.ngram=3"]
    assert "ngram: 2 -> 3" in dypo("plan", a_run, *changed).stdout.replace("\n", " ")
    made = outcomes("grade", a_run, *changed)
    assert made == {
        "grades/round=0": "nothing",
        "ratings/round=0": "made",
        "shards/round=0/route=rl": "made",
        "shards/round=0/route=sft": "made",
    }
    assert not table(a_run, "ratings").equals(before)
    outcomes("grade", a_run, "--set", "train.method.discriminator.ngram=2")
    assert table(a_run, "ratings").equals(before)  # out of superseded/
    assert set(outcomes("grade", a_run, "--set", "train.method.discriminator.ngram=2").values()) == {"nothing"}


def test_a_what_if_rates_as_the_stage_does_and_writes_nothing(a_run: Path) -> None:
    before = sorted(p.relative_to(a_run) for p in a_run.rglob("*"))
    told = dypo("grade", a_run, "--what-if", "grade.easy_max_failures=1").stdout
    assert "easy" in told
    assert sorted(p.relative_to(a_run) for p in a_run.rglob("*")) == before


def test_killed_once_the_ratings_are_there_or_before_it_ends_in_the_same_rows(graded: Path, a_run: Path) -> None:
    for gone in (["ratings"], ["ratings", "shards"]):
        for name in gone:
            shutil.rmtree(a_run / name)
        (a_run / "shards").mkdir(exist_ok=True)
        assert kill_when(["grade", a_run], lambda: (a_run / "ratings/round=0").exists())
        dypo("grade", a_run)
        for name in ("grades", "ratings", "shards"):
            assert table(a_run, name).equals(table(graded, name)), name
        assert not list(a_run.rglob(".*.tmp"))
        for path in sorted((graded / "ratings").rglob("part-*.parquet")):
            assert (a_run / path.relative_to(graded)).read_bytes() == path.read_bytes()


def test_a_recipe_without_teachers_is_refused_with_the_way_out(tmp_path: Path) -> None:
    start, _, rest = RECIPE.partition("[[teachers]]")
    lonely = start + "[rollouts]" + rest.partition("[rollouts]")[2]
    path = write_recipe(tmp_path, lonely, **{METHOD: PRISM})
    got = dypo("ingest", path, check=False)
    assert got.returncode == 2
    assert "type = 'prism' learns from traces of every prompt" in got.stderr
    assert "[[teachers]]" in got.stderr
