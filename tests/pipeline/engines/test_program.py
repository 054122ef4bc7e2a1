"""Engine `program`: built-ins and the user's own functions, deterministic, absent or failed sample by sample."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipeline import tiny
from pipeline.engines import program
from pipeline.engines.base import Ask, Failure, Sample
from pipeline.engines.program import ProgramTeacher
from pipeline.engines.teachers import content_id, teacher_engine
from schemas.errors import UserError
from schemas.ids import seed_from
from schemas.recipe import Teacher


def ask(prompt: str, samples: int = 1, metadata: dict[str, Any] | None = None) -> Ask:
    return Ask(f"id of {prompt}", [{"role": "user", "content": prompt}], tuple(range(samples)), 7, "42", metadata or {})


def teacher(text: str) -> Teacher:
    return Teacher.model_validate({"name": "t", "engine": {"type": "program", "program": text}})


def got(engine: Any, asks: list[Ask], finished: frozenset = frozenset()) -> list[Sample | Failure]:
    return [item for batch in engine.run(asks, finished) for item in batch]


def own(path: Path, code: str, function: str = "solve") -> str:
    path.write_text(code)
    return f"{path}:{function}"


@pytest.mark.parametrize("name", list(tiny.TEACHERS))
def test_the_tiny_teachers_write_what_their_functions_write(name: str) -> None:
    engine = teacher_engine(teacher(f"tiny.{name}"))
    rows = got(engine, [ask("5+6+82", samples=2)])
    for i, row in enumerate(rows):
        assert isinstance(row, Sample)
        assert row.text == tiny.TEACHERS[name]("5+6+82", random.Random(seed_from(7, i)))
        assert (row.finish_reason, row.model, row.sample) == ("stop", f"tiny.{name}", i)
    assert engine.complete
    assert got(engine, [ask("5+6+82", samples=2)]) == rows


def test_finished_samples_are_left_out_and_the_others_are_the_same() -> None:
    engine = ProgramTeacher("tiny.noisy")
    everything = got(engine, [ask("5+6", 3), ask("7+8", 3)])
    rest = got(engine, [ask("5+6", 3), ask("7+8", 3)], frozenset({("id of 5+6", 1), ("id of 7+8", 0)}))
    assert rest == [r for r in everything if (r.prompt_id, r.sample) not in {("id of 5+6", 1), ("id of 7+8", 0)}]


def test_samples_come_in_lists_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FLUSH_ROWS", 4)
    sizes = [len(batch) for batch in ProgramTeacher("tiny.left").run([ask("5+6", 10)], frozenset())]
    assert sizes == [4, 4, 2]


def test_a_worked_solution_is_the_trace_and_its_absence_is_no_failure() -> None:
    engine = ProgramTeacher("worked_solution")
    rows = got(engine, [ask("a", metadata={"solution": "so 42"}), ask("b"), ask("c", metadata={"solution": " "})])
    assert [(r.prompt_id, r.text) for r in rows if isinstance(r, Sample)] == [("id of a", "so 42")]
    assert len(rows) == 1
    assert not engine.complete


def test_worked_solutions_that_no_prompt_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher 't': .*`solution`.* none of the 2 prompts has one. Give the source"):
        got(teacher_engine(teacher("worked_solution")), [ask("a"), ask("b")])


def test_a_function_of_the_users_gets_prompt_and_rng_and_the_columns_that_it_names(tmp_path: Path) -> None:
    code = "def solve(prompt, rng, *, answer, sample):\n    return f'{prompt} {answer} {sample} {rng.random()}'\n"
    engine = ProgramTeacher(own(tmp_path / "own.py", code))
    texts = [r.text for r in got(engine, [ask("p", 2)]) if isinstance(r, Sample)]
    assert texts == [f"p 42 {i} {random.Random(seed_from(7, i)).random()}" for i in (0, 1)]
    code = "def solve(prompt, rng, **row):\n    return ' '.join(sorted(row))\n"
    (row,) = got(ProgramTeacher(own(tmp_path / "own2.py", code)), [ask("p")])
    assert isinstance(row, Sample)
    assert row.text == "answer messages metadata prompt_id sample"


def test_a_function_that_raises_or_returns_no_text_fails_its_sample_alone(tmp_path: Path) -> None:
    code = """
def solve(prompt, rng):
    if prompt == "raise":
        raise ValueError("too hard")
    return {"none": None, "empty": "", "number": 3, "half": "\\ud83d"}.get(prompt, "fine")
"""
    rows = got(
        ProgramTeacher(own(tmp_path / "own.py", code)), [ask(p) for p in ("raise", "none", "empty", "number", "half", "p")]
    )
    raised, empty, number, half, fine = rows
    assert isinstance(raised, Failure)
    assert "ValueError: too hard (own.py, line 4)" in raised.why
    assert isinstance(empty, Failure)
    assert "it returned an empty text" in empty.why
    assert isinstance(number, Failure)
    assert "expected a text (or None), it returned int 3" in number.why
    assert isinstance(half, Failure)
    assert isinstance(fine, Sample)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tiny.lefft", "unknown program 'tiny.lefft'. Did you mean 'tiny.left'? Expected one of tiny.left"),
        ("nowhere.py:solve", "nowhere.py: no such file, for program 'nowhere.py:solve'. Correct the path"),
        ("{own}:", "expected path/to/file.py:function"),
        ("{own}:other", "expected a function 'other', found solve, two. Define it as `def other(prompt, rng)"),
        ("{own}:two", "expected a function (prompt, rng) that may also take answer"),
        ("{broken}:solve", "cannot be imported: SyntaxError"),
    ],
)
def test_a_program_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path, text: str, said: str) -> None:
    own(tmp_path / "own.py", "def solve(prompt, rng): return 'x'\ndef two(prompt): return 'x'\n")
    own(tmp_path / "broken.py", "def solve(:\n")
    with pytest.raises(UserError) as e:
        teacher_engine(teacher(text.format(own=tmp_path / "own.py", broken=tmp_path / "broken.py")))
    assert str(e.value).startswith("teacher 't': ")
    assert said in str(e.value)


def test_the_content_id_is_that_of_the_users_file_and_built_ins_have_none(tmp_path: Path) -> None:
    it = teacher(own(tmp_path / "own.py", "def solve(prompt, rng): return 'x'\n"))
    first = content_id(it)
    own(tmp_path / "own.py", "def solve(prompt, rng): return 'y'\n")
    assert first is not None
    assert content_id(it) not in (first, None)
    assert content_id(teacher("tiny.left")) is None
    (row,) = got(teacher_engine(it), [ask("p")])
    assert isinstance(row, Sample)
    assert row.text == "y"
