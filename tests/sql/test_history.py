"""Rows in, rows out for the documented queries over grades, teachers and curriculum weights (docs/sql.md, by title)."""

from typing import Any

import duckdb
import pyarrow as pa

from schemas.tables import ARROW
from tests.sql.test_curriculum import graded
from tests.test_sql_docs import SECTIONS

QUERIES = {title: query for title, _, query in SECTIONS}


def rows_of(title: str, **tables: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a documented query makes of these rows; columns that a row does not name are null."""
    con = duckdb.connect()
    for name, rows in tables.items():
        con.register(name, pa.Table.from_pylist(rows, schema=ARROW[name]))
    return con.execute(QUERIES[title]).fetchall()


def verdict(teacher: str, prompt: str, correct: bool) -> dict[str, Any]:
    return {"kind": "trace", "id": f"{teacher}{prompt}", "prompt_id": prompt, "teacher": teacher, "correct": correct}


GRADES = [
    graded("a", "hard", 0), graded("b", "easy", 0, 4), graded("c", "mid", 0, 2), graded("d", "mid", 0, 1),
    graded("a", "mid", 1, 1), graded("b", "mid", 1, 3), graded("d", "mid", 1, 3), graded("c", "easy", 1, 4, source=0),
    graded("c", "hard", 2),
]  # fmt: skip


def test_learned_and_forgotten_are_counted_between_grades_on_own_rollouts() -> None:
    assert rows_of("Learned and forgotten", grades=GRADES) == [
        (0, 1, "as it was", 1, 0.5), (0, 1, "forgotten", 1, -0.25), (0, 1, "learned", 1, 0.25), (0, 2, "forgotten", 1, -0.5),
    ]  # fmt: skip


def test_transitions_count_prompts_between_consecutive_rounds() -> None:
    rows = [r for r in GRADES if r["source_round"] == r["round"] < 2]
    assert sorted(rows_of("Grade transitions", grades=rows)) == [
        (0, "easy", "mid", 1), (0, "hard", "mid", 1), (0, "mid", "mid", 1),
    ]  # fmt: skip


HARD = [graded(p, "hard", 0) for p in "abcd"] + [graded("e", "mid", 0, 2)]
TRACES = [
    *(verdict("big", p, True) for p in "abe"), verdict("big", "c", False), verdict("big", "d", False),
    verdict("copy", "a", True), verdict("copy", "b", True), verdict("rare", "c", True), verdict("rare", "a", False),
]  # fmt: skip


def test_coverage_of_hard_prompts_by_each_teacher_and_by_it_alone() -> None:
    assert rows_of("Teachers on Hard prompts", grades=HARD, scores=TRACES) == [
        ("big", 2, 0, 50.0), ("copy", 2, 0, 50.0), ("rare", 1, 1, 25.0),
    ]  # fmt: skip


def test_what_one_more_teacher_adds_is_the_best_order_of_teachers() -> None:
    assert rows_of("What one more teacher adds", grades=HARD, scores=TRACES) == [
        (1, "big", 2, 2), (2, "rare", 1, 3), (3, "copy", 0, 3),
    ]  # fmt: skip


def test_agreement_of_two_teachers_is_over_the_prompts_that_both_were_asked() -> None:
    assert rows_of("Teachers side by side", scores=TRACES) == [
        ("big", "copy", 2, 2, 0, 0, 0), ("big", "rare", 2, 0, 1, 1, 0), ("copy", "rare", 1, 0, 1, 0, 0),
    ]  # fmt: skip


def test_hard_prompts_that_no_teacher_solves_are_listed() -> None:
    grades = [{**graded("a", "hard", 0), "reason": "no_verified_trace"}, graded("b", "hard", 0)]
    prompts = [
        {"prompt_id": p, "messages": [{"role": "user", "content": f"what is {p}?"}], "answer": "1", "verifier": "v", "source": "s", "split": "train"}
        for p in "ab"
    ]  # fmt: skip
    assert rows_of("Hard prompts that no teacher solves", grades=grades, prompts=prompts) == [
        ("a", 0, "s", "1", "what is a?")
    ]


def test_weights_by_grade() -> None:
    shards = [
        {"round": 0, "route": route, "prompt_id": p, "item_id": f"{p}{i}", "w_sft": sft, "w_grpo": rl, "w_gal": rl}
        for route, p, i, sft, rl in (("sft", "a", 0, 0.5, 0.0), ("sft", "b", 0, 1.0, 0.0), ("rl", "e", 0, 0.0, 0.75), ("rl", "e", 1, 0.0, 0.75))
    ]  # fmt: skip
    assert rows_of("Weights by grade", shards=shards, grades=HARD) == [
        (0, "hard", "sft", 2, 0.75, 0.5, 1.0), (0, "mid", "rl", 1, 0.75, 0.75, 0.75),
    ]  # fmt: skip
