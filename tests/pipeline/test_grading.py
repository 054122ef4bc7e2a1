"""A round is graded the same whatever the threads and memory, part files included, and a refused query moves nothing."""

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import grading, store
from pipeline.context import load
from pipeline.policy import Renderer
from pipeline.stage import describe_part
from pipeline.stages import grade
from pipeline.store import connect, partition, sql
from schemas.errors import UserError
from tests.bench.grade import answered, loop, with_polars
from tests.bench.made_run import make

ROWS = 40_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "run", ROWS).run


def files(run: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Name, rows and hash of every part that grading wrote."""
    out = {}
    for table, keys in (
        ("grades", {"round": 0}),
        ("shards", {"round": 0, "route": "rl"}),
        ("shards", {"round": 0, "route": "sft"}),
    ):
        manifest = partition(run, table, keys).manifest()
        assert manifest is not None
        out[partition(run, table, keys).label] = [(p.name, p.rows, p.sha256) for p in manifest.parts]
    return out


def again(run: Path, *settings: str) -> dict[str, list[tuple[str, int, str]]]:
    for table in ("grades", "shards"):
        shutil.rmtree(run / table, ignore_errors=True)
    grade.run(load(run, list(settings)), 0)
    return files(run)


def change_rollouts(run: Path, change: pl.Expr) -> None:
    """Alters a column of the first part, with a manifest that agrees."""
    part = partition(run, "rollouts", {"round": 0})
    manifest, path = part.manifest(), part.files()[0]
    assert manifest is not None
    rows = pl.from_arrow(store.read_parts([path], "rollouts"))
    assert isinstance(rows, pl.DataFrame)
    part.write(rows.with_columns(change).to_arrow(), "made", path.name)
    part.complete(manifest.model_copy(update={"parts": [describe_part(path), *manifest.parts[1:]]}))


def test_one_thread_and_several_write_the_same_parts_byte_for_byte(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GROUPS_IN_PART", 2)
    one = again(made, "grade.memory_mb=256")
    several = again(made, "grade.memory_mb=2048")
    assert one == several
    rows = [n for _, n, _ in one["shards/round=0/route=rl"]]
    assert rows[:-1] == [2 * 4 * store.ROW_GROUP] * (len(rows) - 1)
    assert len(rows) > 2
    keys = [
        pq.read_table(p, columns=["prompt_id", "sample"])
        for p in partition(made, "shards", {"round": 0, "route": "rl"}).files()
    ]
    stored = [(r["prompt_id"], r["sample"]) for t in keys for r in t.to_pylist()]
    assert stored == sorted(stored)


def test_slices_of_the_prompts_end_in_the_same_parts_as_all_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = again(made)
    settings = ["grade.curriculum='pass_rate'"]
    weighed = again(made, *settings)
    monkeypatch.setattr(grading, "ROWS_PER_MB", 10)  # 384 MB: slices of 3,840 rollouts
    assert again(made) == whole
    assert again(made, *settings) == weighed != whole


def test_it_is_what_polars_and_a_plain_loop_make_of_the_rows(made: Path, tmp_path: Path) -> None:
    again(made)
    assert answered(made) == with_polars(made, tmp_path) == loop(made, tmp_path)


def test_grading_that_was_killed_leaves_a_scratch_folder_that_the_next_one_sweeps(made: Path) -> None:
    left = made / ".grading.killed.tmp"
    left.mkdir()
    (left / "verdicts.parquet").write_bytes(b"half")
    again(made)
    assert not list(made.glob(".grading.*"))


def test_a_query_that_routes_what_is_not_there_is_refused_and_moves_nothing(made: Path, tmp_path: Path) -> None:
    before = again(made)
    mine = tmp_path / "mine.sql"
    mine.write_text(sql("route").replace("r.rollout_id as item_id", "'x' || r.rollout_id as item_id"))
    with pytest.raises(
        UserError, match=r"rl row x[0-9a-f]{32} of prompt [0-9a-f]{32}: a query routed it, and it is no rollout"
    ):
        grade.run(load(made, ["train.method.type=dypo", f"train.method.query={mine}"]), 0)
    assert files(made) == before


def test_a_rollout_whose_lists_disagree_is_refused(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace(str(made), str(run)))
    change_rollouts(run, pl.col("logprobs").list.head(0))
    shutil.rmtree(run / "grades", ignore_errors=True)
    shutil.rmtree(run / "shards", ignore_errors=True)
    with pytest.raises(UserError, match="has old_logprobs and tokens of different lengths"):
        grade.run(load(run), 0)


def test_no_more_prompts_are_rendered_than_it_takes_where_the_tokenizer_is_known(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = Renderer.prompt_tokens
    monkeypatch.setattr(Renderer, "prompt_tokens", lambda self, messages: asked.append(1) or real(self, messages))
    again(made)
    assert 0 < len(asked) < 2048
    run = make(tmp_path / "run", 4000).run
    change_rollouts(run, pl.lit("0" * 64).alias("policy"))
    asked.clear()
    again(run)
    assert len(asked) == 500  # a policy that is not the recipe's: every prompt


def test_the_made_run_has_all_grades(made: Path) -> None:
    again(made)
    found = dict(connect(made).sql("select grade, count(*) from grades group by all").fetchall())
    assert set(found) == {"easy", "mid", "hard"}
    assert sum(found.values()) == ROWS // 8
    assert json.loads((made / "grades/round=0/manifest.json").read_text())["facts"]["grades"] == dict(sorted(found.items()))
