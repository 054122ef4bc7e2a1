"""`dypo score --against` says what a changed verifier would change, keeps its verdicts beside the others, and changes nothing else."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.rescore import against
from pipeline.scorers import exact
from schemas.errors import UserError
from tests.e2e.test_what_if import contents
from tests.tiny_runs import dypo, table

STRICTER = "score.verifiers.sum={type='exact', extract='>([0-9]*[02468])$'}"  # odd sums no longer count


def test_the_answer_is_what_scoring_and_grading_then_do_and_the_run_stays_as_it_is(a_copy: Path) -> None:
    before = contents(a_copy)
    verdicts, grades = table(a_copy, "scores"), table(a_copy, "grades").filter(pl.col("round") == 0)
    found = json.loads(dypo("score", a_copy, "--round", 0, "--set", STRICTER, "--against", 1, "--json").stdout)
    after = contents(a_copy)
    added = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(a_copy).parts[:2] for path in added} == {("superseded", "score")}

    dypo("score", a_copy, "--round", 0, "--set", STRICTER)
    now = contents(a_copy)
    judged = {after[path] for path in added if path.name != "manifest.json"}
    assert judged <= {now[path] for path in now if path.relative_to(a_copy).parts[0] == "scores"}  # moved, not judged again
    both = verdicts.join(table(a_copy, "scores"), on=["kind", "id"], suffix="_now")
    flipped = both.filter(pl.col("status") != pl.col("status_now"))
    assert sum(row["rows"] for row in found["flips"]) == flipped.height > 0
    assert {(row["kind"], row["was"], row["became"]) for row in found["flips"]} == set(
        flipped.select("kind", "status", "status_now").unique().rows()
    )
    assert {row["id"] for row in found["examples"]} <= set(flipped["id"])
    assert all(row["text_end"].endswith(f">{row['extracted_was']}") for row in found["examples"] if row["extracted_was"])

    dypo("grade", a_copy, "--round", 0)
    new = table(a_copy, "grades").filter(pl.col("round") == 0)
    moved = grades.join(new, on="prompt_id", suffix="_then").filter(
        (pl.col("grade") != pl.col("grade_then")) | (pl.col("reason") != pl.col("reason_then"))
    )
    assert {row["prompt_id"]: row["grade_then"] for row in found["changed"]} == dict(
        moved.select("prompt_id", "grade_then").rows()
    )
    assert found["changed"]


def test_asked_again_it_judges_nothing_and_says_the_same(a_copy: Path) -> None:
    first = against(a_copy, [STRICTER], 0, "1")
    kept = contents(a_copy)
    assert against(a_copy, [STRICTER], 0, "1") == first
    assert contents(a_copy) == kept


def test_a_new_version_with_the_same_verdicts_changes_nothing(a_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "VERSION", 99)
    found = against(a_copy, [], 0, "1")
    assert (found.flips, found.changed, found.without) == ([], [], [])
    assert (
        found.verdicts
        == table(a_copy, "scores")
        .filter((pl.col("kind") == "trace") | (pl.col("round") == 0), pl.col("kind") != "eval")
        .height
    )


def test_a_version_that_is_not_kept_is_refused_with_those_that_are(a_copy: Path) -> None:
    refused = dypo("score", a_copy, "--against", 1, check=False)
    assert refused.returncode == 2
    assert "every verdict is of today's verifiers" in refused.stderr
    with pytest.raises(UserError, match=r"no older verdicts of that version on round 1.*\n.*sum 1$"):
        against(a_copy, [STRICTER], 1, "7")


def test_of_several_with_one_number_an_id_names_one(a_copy: Path) -> None:
    dypo("score", a_copy, "--round", 0, "--set", STRICTER)
    other = STRICTER.replace("02468", "13579")
    with pytest.raises(UserError, match="several, name one by its id") as refused:
        against(a_copy, [other], 0, "1")
    ids = [line.split()[0] for line in str(refused.value).splitlines() if "sum 1" in line]
    assert len(ids) == 2
    found = [against(a_copy, [other], 0, each) for each in ids]
    assert found[0].flips != found[1].flips


def test_people_get_flips_examples_and_the_way_on(a_copy: Path) -> None:
    said = dypo("score", a_copy, "--round", 0, "--set", STRICTER, "--against", 1).stdout
    for words in (
        "verdicts flip (scores and grades are as they were)",
        "version_was",
        "text_end",
        "grade_then",
        "without judging again",
    ):
        assert words in said
