"""Every method through the real command: the stages of two rounds on the tiny world, from the same rows of the first round."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.store import ask, connect
from tests.tiny_runs import ROOT, dypo, write_recipe

HORIZON = "grpo = {{ horizon = 64 }}"
METHODS = {
    "sft": "",
    "grpo": "",
    "dr_grpo": HORIZON,
    "dapo": "",
    "gspo": "",
    "cispo": "",
    "sft_then_rl": "sft_lr = 1e-3",
    "uniform_mix": HORIZON,
    "superrl": "",
    "hpt": HORIZON,
    "relift": f"{HORIZON}, sft_lr = 1e-3, sft_rows = 4",
    "luffy": HORIZON,
    "srft": "",
    "chord": "decay_steps = 6",
    "bridge": "adapter_lr = 1e-3, rank = 4, alpha = 8",
    "opd": f'teacher = "{ROOT}/data/tiny_policy"',
    "prism": "sft_rounds = 0",
    "grpo_flat": "",
}
GROUPS = {
    "sft": set(),
    "sft_then_rl": set(),
    "dapo": {"mid"},
    "grpo_flat": {"mid"},
    "superrl": {"easy", "mid"},
    "hpt": {"easy", "mid"},
}
TRACES = {"superrl": {"hard"}, "hpt": {"hard"}, "relift": {"hard"}, "grpo_flat": {"hard"}}
EVERY = {"easy", "mid", "hard"}
ALIKE = {
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "uniform_mix",
    "superrl",
    "hpt",
    "chord",
    "grpo_flat",
}  # the same stages as one of the others
NO_TRACES = {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "opd", "prism"}


def recipe_of(folder: Path, method: str, options: str) -> Path:
    table = ", ".join(filter(None, [f'type = "{method}"', "lr = 1e-3", options.format()]))
    (folder).mkdir(exist_ok=True)
    return write_recipe(
        folder, **{'method = { type = "dypo", lr = 1e-3 }': f"method = {{ {table} }}", "limit = 12": "limit = 4"}
    )


@pytest.fixture(scope="module")
def stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, traces, rollouts and verdicts of round 0, which depend on no method."""
    folder = tmp_path_factory.mktemp("stem")
    path = recipe_of(folder, "grpo", "")
    for stage in (["ingest"], ["generate"], ["score"]):
        dypo(*stage, path)
    return folder / "run"


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] if m in ALIKE else []) for m in METHODS])
def test_a_method_trains_two_rounds_on_the_grades_that_it_says(method: str, stem: Path, tmp_path: Path) -> None:
    path, run = recipe_of(tmp_path, method, METHODS[method]), tmp_path / "run"
    shutil.copytree(stem, run)
    dypo("run", path, "--json")
    con = connect(run)

    def seen(route: str, round: int) -> set[str]:
        query = (
            "select distinct grade from shards join grades using (round, prompt_id) where route = $route and round = $round"
        )
        return set(ask(con, query, route=route, round=round).column("grade").to_pylist())

    graded = ask(con, "select distinct grade from grades where round = 0").column("grade").to_pylist()
    assert seen("rl", 0) == GROUPS.get(method, EVERY) & set(graded)
    traced = ask(con, "select count(*) as n from shards where round = 0 and route = 'sft'").column("n")[0].as_py()
    if method in NO_TRACES:
        assert traced == 0
    elif method in TRACES:
        assert seen("sft", 0) == TRACES[method]
    else:
        assert traced > 0
    drawn = ask(con, "select round, count(*) as n from rollouts group by round").to_pylist()
    assert {r["round"] for r in drawn} == ({0} if method == "sft" else {0, 1})  # those of round 0 are the stem's
    made = ask(
        con, "select round, count(distinct step) as n from metrics where name = 'loss/total' group by round order by 1"
    )
    assert [r["n"] for r in made.to_pylist()] == [6, 6]
    planned = [json.loads(line) for line in dypo("plan", path, "--json").stdout.splitlines()]
    assert {p["state"] for p in planned if "state" in p} == {"done"}
    norms = (
        ask(con, "select max(value) as most from metrics where name like 'grad_norm%' group by round")
        .column("most")
        .to_pylist()
    )
    assert all(norm > 0 for norm in norms)
