"""The streamed digest of a partition is the plain one of all its rows, and finds a key that stands twice."""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import rows_digest
from pipeline.rows_digest import digest_column, digest_parts
from pipeline.store import partition
from schemas.ids import digest
from schemas.ids import rows_digest as plain
from schemas.tables import ARROW, TABLES

ROW = {
    "kind": "rollout", "prompt_id": "p", "round": 0, "step": None, "suite": None, "teacher": None, "status": "ok", "correct": True,
    "extracted": None, "verifier": "v", "verifier_version": 1, "elapsed_ms": 0.0, "detail": None,
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VERDICTS = st.lists(
    st.fixed_dictionaries({"id": TEXT, "text_sha": TEXT, "reward": st.floats(allow_nan=False, allow_infinity=False)}),
    unique_by=lambda r: r["id"],
    max_size=30,
)


def written(folder: str, rows: list[dict[str, Any]]) -> list[Path]:
    part = partition(Path(folder), "scores", {"kind": "rollout", "round": 0})
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return [part.write(pa.Table.from_pylist([ROW | r for r in half], schema=ARROW["scores"]), "f") for half in halves]


@settings(max_examples=40, deadline=None)
@given(VERDICTS, st.integers(1, 40))
def test_it_is_the_digest_of_the_sorted_keys_and_contents(rows: list[dict[str, Any]], batch: int) -> None:
    columns = [*TABLES["scores"].key, *TABLES["scores"].content]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_digest, "BATCH", batch)
        assert digest_parts(written(folder, rows), "scores") == plain([[(ROW | r)[c] for c in columns] for r in rows])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(TEXT)))
def test_a_column_has_the_digest_of_its_list(batches: list[list[str]]) -> None:
    assert digest_column(pa.array(values, pa.string()) for values in batches) == digest([v for b in batches for v in b])


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_key_that_stands_twice_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(rows_digest, "BATCH", batch)
    rows = [{"id": id_, "text_sha": "s", "reward": 1.0} for id_ in ("a", "b", "a", "c")]
    with pytest.raises(AssertionError, match="a key of scores stands twice"):
        digest_parts(written(str(tmp_path), rows), "scores")


def test_no_parts_have_the_digest_of_no_rows() -> None:
    assert digest_parts([], "scores") == plain([])
