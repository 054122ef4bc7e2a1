"""Compaction: the same rows and identity in fewer parts, whatever kills it and whoever reads meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import compact as module
from pipeline.compact import compact
from pipeline.stage import Spec, begin, finish, finished
from pipeline.store import Partition, connect, partition, read_parts
from pipeline.verify import Checked, verify
from schemas.errors import UserError
from schemas.tables import ARROW
from tests.tiny_runs import ROOT


def verdicts(ids: list[int]) -> pa.Table:
    rows = [
        {
            "kind": "rollout", "id": f"r{i:05d}", "prompt_id": f"p{i // 8}", "round": 0, "step": None, "suite": None, "teacher": None,
            "text_sha": "s", "status": "ok", "reward": i / 7, "correct": True, "extracted": None, "verifier": "v",
            "verifier_version": 1, "elapsed_ms": 0.0, "detail": None,
        }
        for i in ids
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ARROW["scores"])


def spec(run: Path) -> Spec:
    return Spec("score", partition(run, "scores", {"kind": "rollout", "round": 0}), {}, {}, 0)


def made(run: Path, sizes: list[int]) -> Partition:
    """A run with one partition whose parts have these sizes."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.toml").write_text("")
    it, at = spec(run), 0
    begin(it)
    for size in sizes:
        it.partition.write(verdicts(list(range(at, at + size))), it.fingerprint)
        at += size
    finish(it)
    return it.partition


def stored(part: Partition) -> list[tuple]:
    return sorted(zip(*(c.to_pylist() for c in read_parts(part.files(), "scores", ["id", "reward"]).columns), strict=True))


def parts_in(part: Partition) -> list[int]:
    manifest = part.manifest()
    assert manifest is not None
    return [p.rows for p in manifest.parts]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(5, 60))
def test_the_same_rows_and_identity_in_fewer_parts(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], full: int
) -> None:
    run = tmp_path_factory.mktemp("compact") / "run"
    part = made(run, sizes)
    before, rows = part.manifest(), stored(part)
    assert before is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUPS_IN_PART", full)
        patch.setattr(module, "rows_in_group", lambda table: 1)
        (done,) = compact(run)
    after = part.manifest()
    assert after is not None
    assert (after.identity, after.rows, after.fingerprint) == (before.identity, before.rows, before.fingerprint)
    assert stored(part) == rows
    assert (done.before, done.after) == (len(sizes), len(parts_in(part)))
    small = [n for n in sizes if n <= full // 2]
    assert len(parts_in(part)) <= len(sizes)
    if len(small) == len(sizes) and sum(sizes) <= full:
        assert parts_in(part) == [sum(sizes)]
    assert all(n <= max(full, *sizes) for n in parts_in(part))


def test_who_opened_the_old_list_reads_on_and_the_next_compaction_sweeps(tmp_path: Path) -> None:
    part = made(tmp_path, [3] * 20)
    reader, rows = connect(tmp_path), stored(part)
    list(compact(tmp_path))
    assert parts_in(part) == [60]
    assert reader.sql("select count(*), count(distinct id) from scores").fetchall() == [(60, 60)]
    assert connect(tmp_path).sql("select count(*), count(distinct id) from scores").fetchall() == [(60, 60)]
    checked = Checked()
    assert {f.kind for f in verify(tmp_path, checked)} == {"left over"}
    list(compact(tmp_path))
    assert [p.name for p in part.folder.glob("part-*")] == ["part-00020.merged.parquet"]
    assert list(verify(tmp_path, Checked())) == []
    assert stored(part) == rows


def test_rows_that_come_later_join_the_merged_ones(tmp_path: Path) -> None:
    part = made(tmp_path, [2] * 10)
    list(compact(tmp_path))
    it = spec(tmp_path)
    begin(it)
    assert len(finished(it, ("id",))) == 20
    it.partition.write(verdicts([20, 21]), it.fingerprint)
    assert (finish(it).added, finish(it).rows) == (2, 22)
    list(compact(tmp_path))
    assert parts_in(part) == [22]
    (part.folder / "manifest.json").unlink()  # without it, merged parts count for those that are gone, others for themselves
    assert len(finished(it, ("id",))) == 22
    assert finish(it).rows == 22


class Killed(BaseException):
    """What stands for kill -9 at one call: nothing after it runs."""


def killed_at(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th change to the file system from now on does not happen, nor does anything after it."""
    left = [n]

    def guarded(real):
        def call(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **more)

        return call

    for owner, name in ((os, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))


def test_killed_at_any_change_of_a_file_no_row_is_lost_or_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = tmp_path / "origin"
    rows = stored(made(origin, [4, 9, 2, 7, 3]))
    list(compact(origin))
    it = spec(origin)
    it.partition.write(verdicts([25, 26]), it.fingerprint)
    finish(it)  # a merged part, its sources beside it, and a new part: sweeping, merging and publishing are all to be done
    rows = stored(it.partition)
    n, cut = 0, True
    while cut:
        run = tmp_path / f"run{n}"
        shutil.copytree(origin, run)
        with monkeypatch.context() as patch:
            killed_at(n, patch)
            try:
                list(compact(run))
                cut = False
            except Killed:
                pass
        part = spec(run).partition
        assert stored(part) == rows, n
        assert {f.kind for f in verify(run, Checked())} <= {"left over"}, n
        assert len(finished(spec(run), ("id",))) == 27, n
        begin(spec(run))
        assert finish(spec(run)).rows == 27, n
        list(compact(run))
        assert stored(part) == rows, n
        assert parts_in(part) == [27], n
        n += 1
    assert n > 10


def test_kill_9_leaves_a_whole_table(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    rows = stored(made(origin, [40] * 120))
    code = "import sys; from pathlib import Path; from pipeline.compact import compact; print('go', flush=True); list(compact(Path(sys.argv[1])))"
    killed = 0
    for n in range(5):
        run = tmp_path / f"run{n}"
        shutil.copytree(origin, run)
        process = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.03 * n)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        part = spec(run).partition
        assert stored(part) == rows
        list(compact(run))
        assert parts_in(part) == [4800]
        assert stored(part) == rows
    assert killed > 0


def test_an_altered_part_is_refused_and_nothing_is_merged(tmp_path: Path) -> None:
    part = made(tmp_path, [3, 3])
    path = part.files()[0]
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    with pytest.raises(UserError, match="altered"):
        list(compact(tmp_path))
    assert parts_in(part) == [3, 3]
