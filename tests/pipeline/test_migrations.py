"""Partitions of older schema versions, one kept for each (tests/fixtures), are read as if they were written now."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.stage import Spec, finish
from pipeline.store import connect, partition, read_parts
from schemas.tables import ARROW
from tests.tiny_runs import ROOT

KEYS = {"rollouts": {"round": 0}, "eval_rollouts": {"round": 0, "step": 0, "suite": "id"}}


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "fixtures" / "schema_v1", run)
    (run / "recipe.toml").write_text("")
    return run


@pytest.mark.parametrize("name", KEYS)
def test_rollouts_of_version_1_say_how_long_their_lists_are(version_1: Path, name: str) -> None:
    part = partition(version_1, name, KEYS[name])
    manifest = part.manifest()
    assert manifest is not None
    assert (manifest.schema_version, [p.schema_version for p in manifest.parts]) == (1, [1])
    whole = read_parts(part.files(), name)
    assert whole.schema.equals(ARROW[name])
    want = [(len(r["prompt_tokens"]), len(r["tokens"])) for r in whole.to_pylist()]
    assert want == [(3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)]
    lengths = read_parts(part.files(), name, ["length", "prompt_length"]).to_pylist()
    assert [(r["prompt_length"], r["length"]) for r in lengths] == want
    view = connect(version_1).sql(f"select prompt_length, length from {name} order by rollout_id").fetchall()
    assert view == want


def test_rows_of_this_version_join_those_of_version_1_in_one_partition(version_1: Path) -> None:
    part = partition(version_1, "rollouts", KEYS["rollouts"])
    before = part.manifest()
    assert before is not None
    rows = read_parts(part.files(), "rollouts").to_pylist()
    new = [
        {**r, "rollout_id": f"new{r['rollout_id']}", "tokens": [*r["tokens"], 0], "logprobs": [*r["logprobs"], 0.0]}
        for r in rows
    ]
    part.write(pa.Table.from_pylist(new, schema=ARROW["rollouts"]), before.fingerprint)
    it = Spec("rollouts", part, {"policy": "p"}, {}, 0)
    assert it.fingerprint == before.fingerprint
    assert finish(it).added == len(rows)
    manifest = part.manifest()
    assert manifest is not None
    assert [p.schema_version for p in manifest.parts] == [1, 2]
    assert manifest.parts[0] == before.parts[0]
    want = sorted(len(r["tokens"]) for r in [*rows, *new])
    assert connect(version_1).sql("select length from rollouts order by length").fetchall() == [(n,) for n in want]
    assert sorted(read_parts(part.files(), "rollouts", ["length"])["length"].to_pylist()) == want
