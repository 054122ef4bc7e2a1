"""Curriculum weights: rows in, rows out; and that they multiply the gates of a round and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pipeline.context import load
from pipeline.stages import grade
from pipeline.store import ask, connect, partition, sql
from schemas.errors import UserError
from schemas.tables import ARROW
from tests.bench.made_run import make


def graded(prompt: str, grade: str, round: int = 1, successes: int = 0, source: int | None = None) -> dict[str, Any]:
    return {
        "prompt_id": prompt, "round": round, "source_round": round if source is None else source, "policy": "p", "k": 4,
        "successes": successes, "unjudged": 0, "grade": grade, "traces": 0, "reason": "rl",
    }  # fmt: skip


def weights(name: str, now: list[dict[str, Any]], before: list[dict[str, Any]] | None = None) -> dict[str, float]:
    con = duckdb.connect()
    for view, rows in (("grades", now), ("earlier_grades", before or [])):
        con.register(view, pa.Table.from_pylist(rows, schema=ARROW["grades"]))
    parameters = {"round": 1}
    return {r["prompt_id"]: r["weight"] for r in ask(con, sql(f"curriculum/{name}"), **parameters).to_pylist()}


def test_pass_rate_weighs_a_group_most_that_is_right_half_of_the_time() -> None:
    rows = [graded("a", "mid", successes=1), graded("b", "mid", successes=2), graded("c", "mid", successes=3)]
    rows += [graded("d", "hard"), graded("e", "mid", round=0, successes=1)]
    assert weights("pass_rate", rows) == {"a": 0.75, "b": 1.0, "c": 0.75, "d": 1.0}


@pytest.mark.parametrize(
    ("before", "now", "weight"),
    [
        ("easy", "mid", 2.0), ("mid", "hard", 2.0), ("easy", "hard", 2.0), ("hard", "hard", 0.5),
        ("hard", "mid", 1.0), ("mid", "mid", 1.0), ("mid", "easy", 1.0), (None, "hard", 1.0),
    ],
)  # fmt: skip
def test_transition_weighs_by_how_the_grade_moved(before: str | None, now: str, weight: float) -> None:
    earlier = [graded("a", before, round=0)] if before else []
    assert weights("transition", [graded("a", now)], earlier) == {"a": weight}


def test_transition_looks_at_the_last_grade_that_was_counted_on_rollouts_of_its_round() -> None:
    earlier = [graded("a", "easy", round=0), graded("a", "hard", round=1), graded("a", "easy", round=2, source=0)]
    con = duckdb.connect()
    con.register("earlier_grades", pa.Table.from_pylist(earlier, schema=ARROW["grades"]))
    con.register("grades", pa.Table.from_pylist([graded("a", "hard", round=3)], schema=ARROW["grades"]))
    assert ask(con, sql("curriculum/transition"), round=3).to_pylist() == [{"prompt_id": "a", "weight": 0.5}]


def test_a_grade_on_reused_rollouts_moved_since_the_rounds_before_theirs() -> None:
    earlier = [graded("moved", "mid", round=0), graded("moved", "hard", round=1), graded("new", "hard", round=1)]
    con = duckdb.connect()
    con.register("earlier_grades", pa.Table.from_pylist(earlier, schema=ARROW["grades"]))
    now = [graded("moved", "hard", round=2, source=1), graded("new", "hard", round=2, source=1)]
    con.register("grades", pa.Table.from_pylist(now, schema=ARROW["grades"]))
    found = {r["prompt_id"]: r["weight"] for r in ask(con, sql("curriculum/transition"), round=2).to_pylist()}
    assert found == {"moved": 2.0, "new": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("made") / "run", 4000).run
    grade.run(load(run), 0)
    return run


def rl(run: Path) -> list[tuple[Any, ...]]:
    query = "select s.item_id, s.advantage, g.successes, g.k, s.w_sft, s.w_grpo, s.w_gal from shards s join grades g using (prompt_id) order by 1"
    return connect(run).sql(query).fetchall()


def test_the_weight_multiplies_the_gates_and_regrades_nothing(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    uniform = rl(run)
    assert {row[4:] for row in uniform} == {(0.0, 1.0, 1.0)}
    outcomes = grade.run(load(run, ["grade.curriculum='pass_rate'"]), 0)
    assert [o.action for o in outcomes] == ["nothing", "made", "made"]
    weighed = rl(run)
    assert [row[:4] for row in weighed] == [row[:4] for row in uniform]
    for _, _, successes, k, *w in weighed:
        p = successes / k
        assert w == pytest.approx([0.0, 4 * p * (1 - p), 4 * p * (1 - p)])
    grade.run(load(run), 0)  # back: the uniform shards were kept
    assert rl(run) == uniform
    mine = tmp_path / "mine.sql"
    mine.write_text("select prompt_id, 3 as weight from grades")
    grade.run(load(run, [f"grade.curriculum='{mine}'"]), 0)
    assert {row[4:] for row in rl(run)} == {(0.0, 3.0, 3.0)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("select prompt_id from grades", "the result lacks weight"),
        ("select prompt_id, 1.0 as weight from grades where grade = 'hard'", "a weight is not finite"),
        ("select prompt_id, -1.0 as weight from grades", "a weight is negative"),
        (
            "select prompt_id, 1.0 as weight from grades union all select prompt_id, 2.0 from grades",
            "the sequence stands twice",
        ),
    ],
)
def test_a_curriculum_that_breaks_a_rule_is_refused_and_the_shards_stay(
    made: Path, tmp_path: Path, text: str, told: str
) -> None:
    before = partition(made, "shards", {"round": 0, "route": "rl"}).manifest()
    mine = tmp_path / "mine.sql"
    mine.write_text(text)
    with pytest.raises(UserError, match=told):
        grade.run(load(made, [f"grade.curriculum='{mine}'"]), 0)
    assert partition(made, "shards", {"round": 0, "route": "rl"}).manifest() == before


def test_a_curriculum_of_another_name_is_told_as_a_file_that_is_not_there(made: Path) -> None:
    with pytest.raises(UserError, match="pass_rat: no such query file"):
        grade.run(load(made, ["grade.curriculum='pass_rat'"]), 0)
