"""`dypo probe variance` through the real command: what it prints, that it writes nothing, what it refuses."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.context import load
from pipeline.probe import variance
from schemas.errors import UserError
from tests.tiny_runs import dypo, table

EXACT = 200_000  # more than the tiny policy has parameters


def probe(run: Path, *args: object) -> dict:
    return json.loads(dypo("probe", "variance", run, "--json", *args).stdout)


def refused(target: Path, **given: int) -> str:
    """What the command's function says, before it has any use for a trainer."""
    with pytest.raises(UserError) as caught:
        variance(load(target), None, **{"round": None, "step": None, "prompts": 64, "sketch": 64, **given})  # type: ignore[arg-type]
    return str(caught.value)


@pytest.fixture(scope="module")
def exact(undisturbed: Path) -> dict:
    return probe(undisturbed, "--round", 0, "--sketch", EXACT)


def test_the_probe_says_what_it_measured_and_of_what(undisturbed: Path, exact: dict) -> None:
    shards = table(undisturbed, "shards").filter(pl.col("round") == 0)
    for route in ("rl", "sft"):
        assert exact["gated"][route] == shards.filter(pl.col("route") == route)["prompt_id"].n_unique()
    assert exact["prompts"]["rl"] == exact["gated"]["rl"] >= 10
    rollouts = table(undisturbed, "rollouts").filter(pl.col("round") == 0)
    assert [exact["policy"]] == rollouts["policy"].unique().to_list()
    assert (exact["round"], exact["step"], exact["on_policy"], exact["sketch"]) == (0, 0, True, None)
    assert exact["method"]["alpha"] == 0.5
    assert exact["weights"] == {"grpo": 0.5, "gal": 0.5}
    assert {"grpo", "gal", "mix"} <= set(exact["components"])
    assert 0.9 < exact["eq19"]["noise_correlation"]["value"] <= 1
    assert exact["eq19"]["variance_ratio"]["value"] > exact["eq19"]["if_independent"]["value"]


def test_the_terminal_shows_the_numbers_of_the_json(undisturbed: Path) -> None:
    args = ("--round", 0, "--prompts", 12, "--sketch", 64)
    found, text = probe(undisturbed, *args), dypo("probe", "variance", undisturbed, *args).stdout
    assert f"12 of {found['gated']['rl']} Mid prompts" in text
    assert "gradients sketched to 64 numbers" in text
    for numbers in (*found["components"].values(), found["eq19"]):
        for cell in numbers.values():
            if isinstance(cell, dict) and cell["value"] is not None:
                assert f"{cell['value']:.3g}" in text


def test_the_sketch_on_the_tiny_policy_is_near_the_exact_gradients(undisturbed: Path, exact: dict) -> None:
    near = probe(undisturbed, "--round", 0)
    assert near["sketch"] == 16_384
    assert near["parameters"] == exact["parameters"] > 16_384
    for name, numbers in exact["components"].items():
        found = near["components"][name]["trace_cov"]["value"]
        assert found != numbers["trace_cov"]["value"]
        assert found == pytest.approx(numbers["trace_cov"]["value"], rel=0.04), name
    for key in ("variance_ratio", "if_independent", "noise_correlation"):
        assert near["eq19"][key]["value"] == pytest.approx(exact["eq19"][key]["value"], rel=0.02)


def test_a_later_checkpoint_is_off_policy_and_gives_other_numbers(undisturbed: Path, exact: dict) -> None:
    last = probe(undisturbed, "--round", 0, "--step", 6, "--sketch", EXACT)
    assert not last["on_policy"]
    assert last["policy"] in table(undisturbed, "rollouts").filter(pl.col("round") == 1)["policy"].to_list()
    assert last["components"]["grpo"] != exact["components"]["grpo"]
    newest = probe(undisturbed, "--prompts", 10, "--sketch", 64)
    assert (newest["round"], newest["on_policy"], newest["prompts"]["rl"], newest["sketch"]) == (1, True, 10, 64)


def test_the_probe_writes_nothing_and_needs_no_training(a_copy: Path, exact: dict) -> None:
    for gone in ("logprobs", "checkpoints", "draws", "metrics"):
        shutil.rmtree(a_copy / gone)
    (a_copy / ".lock").unlink(missing_ok=True)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in a_copy.rglob("*") if p.is_file()}
    found = probe(a_copy, "--round", 0, "--sketch", EXACT)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in a_copy.rglob("*") if p.is_file()}
    for name, numbers in exact["components"].items():
        assert found["components"][name]["trace_cov"] == pytest.approx(numbers["trace_cov"], rel=1e-3)


def test_what_cannot_be_measured_is_refused_with_the_way_out(undisturbed: Path, a_copy: Path, tmp_path: Path) -> None:
    got = dypo("probe", "variance", undisturbed, "--prompts", 3, check=False)
    assert (got.returncode, got.stdout) == (2, "")
    assert "at most 3 of each to be used; an estimate needs at least 10 of a route" in got.stderr
    assert "Run `dypo grade" in refused(undisturbed, round=7)
    assert "no such checkpoint" in refused(undisturbed, round=0, step=3)
    assert "not a run" in refused(tmp_path)
    shutil.rmtree(a_copy / "checkpoints" / "round=0")
    assert "Run `dypo train" in refused(a_copy, round=1)
    shutil.rmtree(a_copy / "shards")
    assert "no shards yet" in refused(a_copy)
