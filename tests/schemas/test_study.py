"""A study file is checked as a whole before anything runs, and every shipped one is valid."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipeline.context import load
from schemas.errors import UserError
from schemas.study import parse_study
from tests.tiny_runs import ROOT

STUDIES = sorted((ROOT / "recipes" / "study").glob("*.toml"))


def tree(**changes: Any) -> dict[str, Any]:
    """A small valid study, with some keys otherwise."""
    return {
        "name": "s",
        "title": "S",
        "folder": "runs/s",
        "seeds": [0, 1],
        "worlds": [{"name": "w", "recipe": "w.toml", "bases": {"a": "a", "b": "b"}}],
        "tuning": {"base": "a", "seed": 100, "suite": "validation", "trials": [{"lr": 1e-4}, {"lr": 1e-3}]},
        "methods": [{"name": "dypo", "method": {"type": "dypo"}}, {"name": "sft", "method": {"type": "sft"}}],
        **changes,
    }


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_shipped_study_is_valid_with_every_recipe_that_it_makes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.study import layout

    monkeypatch.chdir(ROOT)
    plan = layout.read(path)
    for cell in plan.cells():
        plan.context(cell)
        for trial in plan.trials(cell.world, cell.method):
            plan.context(trial)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "study").glob("*/*.toml")), ids=lambda p: "/".join(p.parts[-2:]))
def test_every_world_s_recipe_is_valid_by_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load(path).recipe.train.method.type == "dypo"


def test_there_are_shipped_studies() -> None:
    assert len(STUDIES) >= 1
    assert all(tomllib.loads(p.read_text())["name"] == p.stem for p in STUDIES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, r"sedes: unknown key; did you mean 'seeds'\? Known here"),
        ({"seeds": [0, 0]}, r"seeds: 0 is given twice"),
        ({"seeds": [0, 100]}, r"tuning.seed: 100 is one of seeds, \[0, 100\]; trials that are also results would be favoured"),
        ({"references": ["grpo"]}, r"references: no method is named 'grpo'; there are dypo, sft"),
        ({"probe": {"method": "dypo", "seed": 7, "rounds": [0]}}, r"probe.seed: 7 is not one of seeds, \[0, 1\]"),
        (
            {"methods": [{"name": "a", "method": {"type": "sft"}, "trials": [{"lr": 1e-3}]}]},
            r"methods.a.trials: 1 of them, but tuning.trials has 2: every method gets the same number",
        ),
        (
            {"methods": [{"name": "a", "method": {"type": "sft"}, "tuned_as": "b"}]},
            r"methods.a.tuned_as: 'b' is not a method with trials of its own",
        ),
        (
            {"methods": [{"name": "a", "method": {"type": "sft", "lr": 1e-3}}]},
            r"methods.a: lr is set by the method and by its trials; leave it to the trials",
        ),
        ({"tuning": {"base": "c", "seed": 100, "suite": "v", "trials": [{"lr": 1}]}}, r"tuning.base: 'c' is not among the bases of world 'w'"),
    ],
)  # fmt: skip
def test_a_study_that_contradicts_itself_is_refused_with_the_key_and_the_way_out(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=r"s.toml: the study is not valid") as e:
        parse_study(tree(**changes), "s.toml")
    assert re.search(said, str(e.value)), str(e.value)


def test_a_method_tuned_as_another_has_its_trials() -> None:
    own = [{"lr": 3e-4}, {"lr": 3e-5}]
    methods = [
        {"name": "a", "method": {"type": "sft"}, "trials": own},
        {"name": "b", "method": {"type": "sft"}, "tuned_as": "a"},
    ]
    study = parse_study(tree(methods=methods), "s.toml")
    assert [study.trials_of(m) for m in study.methods] == [own, own]
