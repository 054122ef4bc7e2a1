"""Parts and manifests: whole or absent, never half; altered files are named; unknown versions are refused."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stage import Spec, begin, current, finish, finished, make_table, put_back, superseded
from pipeline.store import MANIFEST, connect, lock, part_fingerprint, partition, partitions, read_parts
from schemas.columns import SCHEMA_VERSION
from schemas.errors import UserError, WorkError
from schemas.tables import ARROW
from tests.tiny_runs import ROOT


def metric_rows(steps: list[int], round: int = 0) -> pa.Table:
    rows = [{"round": round, "step": s, "name": "loss/total", "value": s / 7, "when": 0.0} for s in steps]
    return pa.Table.from_pylist(rows, schema=ARROW["metrics"])


def spec(run: Path, expensive: bool = False, **config: object) -> Spec:
    (run / "recipe.toml").write_text("")
    return Spec("train", partition(run, "metrics", {"round": 0}), dict(config), {"parent": "p"}, 7, expensive)


def test_a_partition_is_in_the_views_only_once_its_manifest_is_written(tmp_path: Path) -> None:
    it = spec(tmp_path)
    begin(it)
    it.partition.write(metric_rows([0, 1]), it.fingerprint)
    assert connect(tmp_path).execute("select count(*) from metrics").fetchall() == [(0,)]
    outcome = finish(it)
    assert (outcome.rows, outcome.added) == (2, 2)
    assert connect(tmp_path).execute("select step, value from metrics order by step").fetchall() == [(0, 0.0), (1, 1 / 7)]


def test_finished_parts_of_a_killed_stage_count_as_finished(tmp_path: Path) -> None:
    it = spec(tmp_path)
    begin(it)
    it.partition.write(metric_rows([0, 1]), it.fingerprint)
    (it.partition.folder / ".part-00001.parquet.99.tmp").write_bytes(b"half")
    begin(it)
    assert finished(it, ("step",)) == {(0,), (1,)}
    assert not list(it.partition.folder.glob(".*"))


def test_adding_rows_keeps_the_fingerprint_and_changes_the_identity(tmp_path: Path) -> None:
    it = spec(tmp_path)
    make_table(it, metric_rows([0]))
    first = it.partition.manifest()
    it.partition.write(metric_rows([1]), it.fingerprint)
    outcome = finish(it)
    second = it.partition.manifest()
    assert first is not None
    assert second is not None
    assert (outcome.action, outcome.added) == ("added", 1)
    assert first.fingerprint == second.fingerprint
    assert first.identity != second.identity


def test_a_changed_setting_moves_the_old_rows_aside_and_going_back_brings_them_back(tmp_path: Path) -> None:
    old, new = spec(tmp_path, lr=1), spec(tmp_path, lr=2)
    make_table(old, metric_rows([0, 1, 2]))
    make_table(new, metric_rows([0]))
    assert (superseded("train", old.partition, old.fingerprint) / MANIFEST).exists()
    begin(old)
    manifest = old.partition.manifest()
    assert manifest is not None
    assert (manifest.fingerprint, manifest.rows) == (old.fingerprint, 3)


def test_expensive_rows_are_not_made_again_without_the_users_word(tmp_path: Path) -> None:
    make_table(spec(tmp_path, temperature=1.0), metric_rows([0]))
    other = spec(tmp_path, expensive=True, temperature=0.7)
    with pytest.raises(UserError, match=r"temperature: 1\.0 -> 0\.7.*--regenerate"):
        begin(other)
    assert other.partition.manifest() is not None
    begin(other, regenerate=True)
    assert other.partition.manifest() is None


def test_what_was_moved_for_rows_that_never_came_is_put_back(tmp_path: Path) -> None:
    old, new = spec(tmp_path, lr=1), spec(tmp_path, lr=2)
    make_table(old, metric_rows([0, 1, 2]))
    begin(new)
    put_back(new, old.fingerprint)
    assert current(old)
    begin(new)
    new.partition.write(metric_rows([0]), new.fingerprint)
    put_back(new, old.fingerprint)  # a row came: it stays, and so do the old ones in superseded/
    assert finished(new, ("step",)) == {(0,)}
    assert superseded("train", old.partition, old.fingerprint).exists()


def test_a_doubled_key_is_never_published(tmp_path: Path) -> None:
    it = spec(tmp_path)
    it.partition.write(metric_rows([0]), it.fingerprint)
    it.partition.write(metric_rows([0]), it.fingerprint)
    with pytest.raises(AssertionError, match="stands twice"):
        finish(it)
    assert it.partition.manifest() is None


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "foreign"])
def test_a_harmed_part_is_refused_by_name_with_the_way_out(tmp_path: Path, harm: str) -> None:
    it = spec(tmp_path)
    make_table(it, metric_rows(list(range(500))))
    path = it.partition.folder / "part-00000.parquet"
    data = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(data[:-50])
    elif harm == "flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif harm == "missing":
        path.unlink()
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError) as e:
        it.partition.verify()
    assert str(path) in str(e.value)
    assert f"delete {it.partition.folder}" in str(e.value)


def test_a_foreign_parquet_file_in_a_partition_is_refused_by_name(tmp_path: Path) -> None:
    it = spec(tmp_path)
    it.partition.folder.mkdir(parents=True)
    path = it.partition.folder / "part-00000.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="dypo did not write"):
        begin(it)


def test_an_unknown_schema_version_is_refused(tmp_path: Path) -> None:
    it = spec(tmp_path)
    make_table(it, metric_rows([0]))
    path = it.partition.folder / MANIFEST
    path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    with pytest.raises(UserError, match=f"schema version 99, but this dypo knows up to {SCHEMA_VERSION}"):
        it.partition.manifest()
    schema = ARROW["metrics"].with_metadata({**ARROW["metrics"].metadata, b"dypo.schema_version": b"99"})
    pq.write_table(metric_rows([0]).replace_schema_metadata(schema.metadata), it.partition.folder / "part-00001.parquet")
    with pytest.raises(UserError, match="schema version 99"):
        part_fingerprint(it.partition.folder / "part-00001.parquet")


def test_a_full_disk_keeps_what_is_finished_and_says_so(tmp_path: Path) -> None:
    """A real limit of the operating system on a file's size stands in for the disk."""
    it = spec(tmp_path)
    it.partition.write(metric_rows([0]), it.fingerprint)
    code = f"""
import resource, signal, sys
from pathlib import Path
from tests.pipeline.test_store import metric_rows, spec
from schemas.errors import WorkError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
it = spec(Path({str(tmp_path)!r}))
try:
    it.partition.write(metric_rows(list(range(1, 200_000))), it.fingerprint)
except WorkError as e:
    print(e)
    sys.exit(e.exit_code)
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 1, got.stderr
    assert "could not be written" in got.stdout
    assert "File too large" in got.stdout
    assert "Finished parts are kept" in got.stdout
    assert finished(it, ("step",)) == {(0,)}
    assert [p.name for p in it.partition.folder.iterdir()] == ["part-00000.parquet"]


def test_a_kill_at_any_instant_leaves_whole_parts_only(tmp_path: Path) -> None:
    it = spec(tmp_path)
    code = f"""
from pathlib import Path
from tests.pipeline.test_store import metric_rows, spec
it = spec(Path({str(tmp_path)!r}))
print("ready", flush=True)
for s in range(10_000):
    it.partition.write(metric_rows(list(range(s * 100, s * 100 + 100))), it.fingerprint)
"""
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        while not list(it.partition.folder.glob("part-*.parquet")):
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        paths = sorted(it.partition.folder.glob("part-*.parquet"))
        assert paths
        assert all(pq.read_table(p, page_checksum_verification=True).num_rows == 100 for p in paths)
        begin(it)
        for p in paths:
            p.unlink()


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    code = f"from pathlib import Path\nfrom pipeline.store import lock\nwith lock(Path({str(tmp_path)!r})): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"another dypo process \\(pid {other.pid}\\)"), lock(tmp_path):
            pass
        other.communicate(b"\n")
    with lock(tmp_path):
        pass


def test_the_connection_reaches_nothing_outside_the_run_and_cannot_be_unlocked(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    make_table(spec(tmp_path / "run"), metric_rows([0]))
    con = connect(tmp_path / "run")
    for text in (
        f"select * from read_csv('{tmp_path}/secret.csv')",
        f"select * from read_text('{tmp_path}/secret.csv')",
        "set enable_external_access = true",
        f"attach '{tmp_path}/x.db'",
        "install httpfs",
    ):
        with pytest.raises(duckdb.Error):
            con.execute(text)
    assert con.execute("select count(*) from metrics").fetchall() == [(1,)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), unique=True, max_size=8), max_size=6))
def test_the_anti_join_ends_in_each_row_once_however_often_it_is_cut_off(tmp_path_factory, wanted: list[list[int]]) -> None:
    """Each inner list is one attempt's work list; whatever was finished before is not done again."""
    run = tmp_path_factory.mktemp("run")
    it = spec(run)
    for attempt in wanted:
        begin(it)
        done = {s for (s,) in finished(it, ("step",))}
        todo = [s for s in attempt if s not in done]
        if todo:
            it.partition.write(metric_rows(todo), it.fingerprint)
    if wanted and any(wanted):
        finish(it)
        rows = read_parts(it.partition.files(), "metrics").column("step").to_pylist()
        assert sorted(rows) == sorted({s for attempt in wanted for s in attempt})


def test_the_operating_system_error_becomes_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    it = spec(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="No space left on device"):
        it.partition.write(metric_rows([0]), it.fingerprint)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_parts_past_a_hundred_thousand_do_not_overwrite_each_other(tmp_path: Path) -> None:
    it = spec(tmp_path)
    it.partition.write(metric_rows([0]), it.fingerprint, "part-99999.parquet")
    names = [it.partition.write(metric_rows([s]), it.fingerprint).name for s in (1, 2)]
    assert names == ["part-100000.parquet", "part-100001.parquet"]
    assert finish(it).rows == 3


def test_a_manifest_in_what_a_killed_writer_left_is_no_partition(tmp_path: Path) -> None:
    it = spec(tmp_path)
    make_table(it, metric_rows([0]))
    left = it.partition.folder / ".round=1.99.tmp"
    left.mkdir()
    (left / MANIFEST).write_text("{}")
    assert [p.label for p in partitions(tmp_path, "metrics")] == ["metrics/round=0"]
    it.partition.remove_temporary()
    assert not left.exists()
