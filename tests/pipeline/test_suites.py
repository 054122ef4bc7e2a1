"""Benchmarks in their own schemas (data/suites, our own problems), options shuffled by seed, templates, and the hub."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import tiny
from pipeline.hub import fetch
from pipeline.scorers import check_gold, math_answer
from pipeline.sources import content_id, read_source
from schemas.errors import UserError
from schemas.recipe import FileSource
from schemas.scorers import ChoiceScorer, MathScorer
from schemas.templates import PROMPTS, asked
from tests.tiny_runs import ROOT

SUITES = ROOT / "data" / "suites"
TINY = ROOT / "data" / "tiny"


def source(path: Path, **more: Any) -> FileSource:
    return FileSource.model_validate({"type": "file", "name": "s", "path": path, "verifier": "v", "split": "eval", **more})


def rows(name: str, **more: Any) -> list[dict[str, Any]]:
    return read_source(source(SUITES / name, **more)).to_pylist()


def refused(it: FileSource) -> str:
    with pytest.raises(UserError) as e:
        read_source(it)
    return str(e.value)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- schemas
@pytest.mark.parametrize(
    ("name", "first", "answers"),
    [
        ("aime24.parquet", "Find the number of ordered", ["050", "008", "011"]),
        ("aime25.jsonl", "Find the least positive", ["14", "84", "142"]),
        ("amc.parquet", "What is the sum of the first", ["144", "30", "18"]),
        ("math500.jsonl", "Simplify", ["4\\sqrt{2}", "(-1,4)", "\\frac{1}{6}", "x^2+3x-10"]),
        ("minerva.jsonl", "Light of wavelength", ["6e14", "\\sqrt{k/m}", "20"]),
    ],
)
def test_a_benchmark_is_read_in_its_own_columns(name: str, first: str, answers: list[str]) -> None:
    made = rows(name)
    assert made[0]["messages"][-1]["content"].startswith(first)
    assert [r["answer"] for r in made] == answers
    assert all(check_gold(MathScorer(), r["answer"], None) is None for r in made)
    assert all("answer" not in json.loads(r["metadata"]) for r in made)


def test_a_solution_with_a_box_serves_as_gold_where_there_is_no_answer(tmp_path: Path) -> None:
    """Minerva's other form: problem, solution, type, idx."""
    row = {"problem": "p", "solution": "First 3, then \\boxed{4.5e33} as found.", "type": "Physics", "idx": 0}
    (made,) = read_source(source(jsonl(tmp_path / "a.jsonl", row))).to_pylist()
    assert math_answer.score("so \\boxed{4.5e33}", made["answer"]).status == "ok"
    assert math_answer.score("so \\boxed{3}", made["answer"]).status == "wrong"


def test_a_power_of_ten_as_gold_is_a_number() -> None:
    for said in ("6 \\times 10^{14}", "6.0 \\cdot 10^{14}", "600000000000000", "6e14"):
        assert math_answer.score(f"\\boxed{{{said}}}", "6e14").status == "ok", said
    assert math_answer.score("\\boxed{6 \\times 10^{-14}}", "6e14").status == "wrong"
    assert math_answer.score("\\boxed{6 \\times 10^{-14}}", "6.0E-14").status == "ok"


def test_options_are_lettered_and_the_gold_is_the_letter_of_the_right_one() -> None:
    right = {
        "Which of these is needed": "evaporation",
        "A magnet lifts": "an iron nail",  # its key is a number in the file
        "Which part of a plant": "root",
        "Which of these changes": "rusting iron",
        "A photon scatters": "one Compton wavelength",
        "A student says": "acid and base are equally concentrated",
        "A cross of AaBb": "10 cM",
    }
    made = rows("arc_c.parquet") + rows("gpqa_diamond.csv")
    assert len(made) == 7
    for row in made:
        text, metadata = row["messages"][-1]["content"], json.loads(row["metadata"])
        (wanted,) = [option for start, option in right.items() if text.startswith(start)]
        assert f"\n{row['answer']}) {wanted}" in text
        assert check_gold(ChoiceScorer(), row["answer"], None) is None
        assert metadata["options"]["ABCDE".index(row["answer"])] == wanted
        assert sorted(metadata["options_order"]) == list(range(len(metadata["options"])))
        assert not {"choices", "answerKey", "Correct Answer", "Incorrect Answer 1"} & set(metadata)
    assert {r["answer"] for r in rows("gpqa_diamond.csv")} != {"A"}  # in the file the right one is always first


def test_a_field_of_a_csv_file_may_hold_quotes_and_lines() -> None:
    texts = [r["messages"][-1]["content"] for r in rows("gpqa_diamond.csv")]
    assert 'A student says, "the buffer has pH = pKa".' in texts[1]
    assert "in 90 of 100 offspring.\nHow far apart" in texts[2]


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    orders = {
        seed: [json.loads(r["metadata"])["options_order"] for r in rows("arc_c.parquet", options_seed=seed)]
        for seed in (0, 1)
    }
    assert orders[0] != orders[1]
    assert rows("arc_c.parquet") == rows("arc_c.parquet", options_seed=0)


def test_the_order_of_options_depends_on_the_question_alone(tmp_path: Path) -> None:
    table = pq.read_table(SUITES / "arc_c.parquet")
    pq.write_table(table.slice(1).take([2, 0]), tmp_path / "some.parquet")
    whole = {r["prompt_id"]: r for r in rows("arc_c.parquet")}
    some = read_source(source(tmp_path / "some.parquet")).to_pylist()
    assert len(some) == 2
    assert all(whole[r["prompt_id"]] == r for r in some)


def test_every_place_is_as_likely_for_the_right_option(tmp_path: Path) -> None:
    gpqa = {"Correct Answer": "r", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y", "Incorrect Answer 3": "z"}
    path = jsonl(tmp_path / "a.jsonl", *({"Question": f"q{i}", **gpqa} for i in range(2000)))
    answers = read_source(source(path))["answer"].to_pylist()
    assert all(440 <= answers.count(letter) <= 560 for letter in "ABCD")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}, "`answerKey`: expected one of the labels A, B, found 'C'"),
        ({"choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "A"}, "`choices`: expected {text, label}, two lists of the same"),
        ({"choices": ["a", "b"], "answerKey": "A"}, "`choices`: expected {text, label}"),
        ({"choices": {"text": ["a", " "], "label": ["A", "B"]}, "answerKey": "A"}, "expected an option's text"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_with_their_row(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    said = refused(source(jsonl(tmp_path / "a.jsonl", {"question": "q", **row})))
    assert f"{tmp_path / 'a.jsonl'}, row 1: " in said
    assert told in said


def test_a_csv_row_of_another_width_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('problem,answer\n"two\nlines",1\nq,2,3\n')
    assert f"{path}, row 2 (it ends in line 4): expected 2 fields, as in the first line, found more" in refused(source(path))
    path.write_text("problem,answer\nq\n")
    assert "found fewer" in refused(source(path))
    path.write_text('problem,answer\n"q,2\n')
    assert "not readable as CSV" in refused(source(path))


def test_the_committed_fixtures_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "data" / "make_suites.py", "--out", tmp_path], check=True)
    for path in SUITES.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


# ---------------------------------------------------------------- templates of a source
def test_a_template_says_what_is_asked_and_leaves_the_gold_answer_alone() -> None:
    plain, think = rows("aime25.jsonl"), rows("aime25.jsonl", template="think")
    assert [r["answer"] for r in think] == [r["answer"] for r in plain]
    system, user = think[0]["messages"]
    assert system["role"] == "system"
    assert "<think>\n" in system["content"]
    assert "\\boxed{}" in system["content"]
    assert user == plain[0]["messages"][0]
    (boxed, *_) = rows("aime25.jsonl", template="boxed")
    assert boxed["messages"][0]["content"].startswith(user["content"])
    (letter, *_) = rows("arc_c.parquet", template="letter", system="Be brief.")
    assert [m["role"] for m in letter["messages"]] == ["system", "user"]
    assert "ANSWER:" in letter["messages"][1]["content"]
    assert "\nA) " in letter["messages"][1]["content"]


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30), st.sampled_from([*PROMPTS, "Q: {problem}\nA: \\boxed{}"]))
def test_a_template_holds_the_problem_once_and_unchanged(problem: str, template: str) -> None:
    system, text = asked(template, problem)
    whole = PROMPTS.get(template, (None, template))[1]
    before, after = whole.split("{problem}")
    assert text == before + problem + after
    assert system is None or "{" not in system.replace("\\boxed{}", "")


# ---------------------------------------------------------------- the hub
def cached(
    monkeypatch: pytest.MonkeyPatch, folder: Path, repo: str, files: dict[str, bytes], revision: str = "main"
) -> None:
    """A cache as huggingface_hub lays it out, and no way to the hub."""
    import huggingface_hub.constants as constants

    at = folder / f"datasets--{repo.replace('/', '--')}"
    for name, content in files.items():
        path = at / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (at / "refs").mkdir()
    (at / "refs" / revision).write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_what_the_hub_has_is_put_where_path_says_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (SUITES / "aime25.jsonl").read_bytes()
    cached(monkeypatch, tmp_path / "cache", "made/aime", {"data/test.jsonl": content}, "v1")
    it = source(tmp_path / "eval" / "aime.jsonl", hub="made/aime/data/test.jsonl@v1")
    with pytest.raises(UserError, match=r"not there yet\. `dypo ingest` fetches it"):
        content_id(it)
    fetch(it)
    assert it.path.read_bytes() == content
    assert read_source(it).num_rows == 3
    it.path.write_bytes(b"mine")
    fetch(it)
    assert it.path.read_bytes() == b"mine"


def test_a_data_set_with_one_file_needs_no_more_than_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    cached(monkeypatch, tmp_path / "cache", "made/math", {"test.jsonl": b"{}"})
    listed = ["README.md", "test.jsonl"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, repo_type, revision: listed)
    it = source(tmp_path / "math.jsonl", hub="made/math")
    fetch(it)
    assert it.path.read_bytes() == b"{}"
    it.path.unlink()
    listed.append("train.jsonl")
    with pytest.raises(UserError, match=r"found 2: test\.jsonl, train\.jsonl\. Name one: hub = 'made/math/FILE'"):
        fetch(it)


def test_what_cannot_be_fetched_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(monkeypatch, tmp_path / "cache", "made/aime", {"test.jsonl": b"{}"})
    with pytest.raises(UserError, match=r"source 's': hub = 'made/other/x\.jsonl': could not be fetched .* put the file at"):
        fetch(source(tmp_path / "x.jsonl", hub="made/other/x.jsonl"))
    with pytest.raises(UserError, match="Expected the same extension"):
        fetch(source(tmp_path / "x.parquet", hub="made/aime/test.jsonl"))
    assert not list(tmp_path.glob("x.*"))


def test_where_a_file_comes_from_is_no_part_of_what_it_is() -> None:
    here, from_hub = source(SUITES / "aime25.jsonl"), source(SUITES / "aime25.jsonl", hub="math-ai/aime25/test.jsonl")
    assert content_id(here) == content_id(from_hub)
    assert read_source(here).equals(read_source(from_hub))


# ---------------------------------------------------------------- the tiny world's large sets
def problems(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def test_the_large_sets_have_1000_problems_each_that_stand_nowhere_else() -> None:
    large = {kind: problems(f"eval1000_{kind}") for kind in ("id", "shift", "sub")}
    small = [problem for name in ("train", "eval_id", "eval_shift", "eval_sub") for problem in problems(name)]
    every = [problem for of_kind in large.values() for problem in of_kind]
    assert {kind: len(of_kind) for kind, of_kind in large.items()} == {"id": 1000, "shift": 1000, "sub": 1000}
    assert len({*every, *small}) == len(every) + len(small)
    for kind in large:
        made = read_source(source(TINY / f"eval1000_{kind}.jsonl")).to_pylist()
        assert all(r["answer"] == tiny.gold(r["messages"][0]["content"]) for r in made)
    assert all("-" in problem for problem in large["sub"])
    assert not any("-" in problem for problem in large["id"] + large["shift"])


def test_a_set_is_seeded_by_its_kind_and_avoids_what_is_taken() -> None:
    first = tiny.suite("id", set(), 50)
    assert tiny.suite("id", set(), 50) == first
    assert not set(tiny.suite("id", set(first), 50)) & set(first)
    assert all(tiny.is_right(p, tiny.left(p, random.Random(0))) for p in first)


def test_the_large_sets_are_made_again_and_pretraining_has_none_of_them(tmp_path: Path) -> None:
    """The script draws pretraining's problems again; the committed bytes are what it leaves."""
    subprocess.run([sys.executable, ROOT / "data" / "make_tiny_suites.py", "--out", tmp_path], check=True, env=env())
    for kind in ("id", "shift", "sub"):
        name = f"eval1000_{kind}.jsonl"
        assert (tmp_path / "tiny" / name).read_bytes() == (TINY / name).read_bytes()


def env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
