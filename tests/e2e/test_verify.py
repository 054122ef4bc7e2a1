"""`dypo verify` on a real run: whole as it was made; every kind of harm is found by name, and nothing else is called harm."""

import json
import random
import shutil
from pathlib import Path

import pytest

from pipeline.store import MANIFEST
from pipeline.verify import HARM, Checked, verify
from schemas.errors import UserError
from tests.tiny_runs import dypo


def found(run: Path) -> list[tuple[str, str]]:
    return [(each.kind, str(Path(each.path).relative_to(run))) for each in verify(run, Checked())]


def files(run: Path) -> list[Path]:
    return sorted(p for m in run.rglob(MANIFEST) for p in m.parent.rglob("*") if p.is_file())


def test_a_run_as_it_was_made_is_whole_and_every_file_of_its_tables_was_read(undisturbed: Path) -> None:
    checked = Checked()
    assert list(verify(undisturbed, checked)) == []
    listed = {p for p in files(undisturbed) if p.name != MANIFEST}
    assert checked.files == len(listed) > 40
    assert checked.bytes == sum(p.stat().st_size for p in listed)
    said = dypo("verify", undisturbed, "--json").stdout.splitlines()
    assert json.loads(said[-1]) == {"harmed": 0, **vars(checked)}


def test_one_flipped_bit_in_any_listed_file_or_a_broken_manifest_is_found_and_only_there(a_copy: Path) -> None:
    rng = random.Random(0)
    for path in files(a_copy):
        data = path.read_bytes()
        if path.name == MANIFEST:
            path.write_bytes(data.replace(b'"table"', b'"tabel"', 1))
        else:
            at = rng.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        kind = "unreadable" if path.name == MANIFEST else "altered"
        assert found(a_copy) == [(kind, str(path.relative_to(a_copy)))]
        path.write_bytes(data)
    assert found(a_copy) == []


def test_missing_and_truncated_parts_and_orphans_are_all_told_at_once_with_exit_code_1(a_copy: Path) -> None:
    rollouts = next((a_copy / "rollouts").rglob("part-*.parquet"))
    scores = next((a_copy / "scores").rglob("part-*.parquet"))
    shutil.copy(scores, rollouts.with_name("part-00077.parquet"))  # whole, but of another table and other settings
    (rollouts.parent / "notes.txt").write_text("mine")
    rollouts.unlink()
    scores.write_bytes(scores.read_bytes()[:-1])
    got = dypo("verify", a_copy, check=False)
    assert got.returncode == 1
    kinds = [line.split(":")[0] for line in got.stdout.splitlines()]
    assert sorted(kinds[:-1]) == ["altered", "missing", "orphan", "orphan"]
    assert f"missing: {rollouts}" in got.stdout
    assert f"orphan: {rollouts.parent / 'notes.txt'}: no manifest lists it" in got.stdout
    assert "4 files are not what the run's manifests say" in got.stderr


@pytest.mark.parametrize("beside_a_manifest", [True, False])
def test_what_a_killed_stage_left_is_no_harm(a_copy: Path, beside_a_manifest: bool) -> None:
    part = next((a_copy / "rollouts").rglob("part-*.parquet"))
    if beside_a_manifest:
        shutil.copy(part, part.with_name("part-00077.parquet"))
    else:
        (part.parent / MANIFEST).unlink()
    (part.parent / ".part-00078.parquet.99.tmp").write_bytes(b"half")
    kinds = {kind for kind, _ in found(a_copy)}
    assert kinds == {"left over", "unfinished"}
    assert not kinds & set(HARM)
    assert dypo("verify", a_copy).returncode == 0


def test_superseded_rows_are_looked_at_too(a_copy: Path) -> None:
    dypo("grade", a_copy, "--round", 0, "--set", "grade.easy_max_failures=1")
    old = next((a_copy / "superseded").rglob("part-*.parquet"))
    assert found(a_copy) == []
    old.write_bytes(old.read_bytes() + b"x")
    assert found(a_copy) == [("altered", str(old.relative_to(a_copy)))]


@pytest.mark.parametrize("name", ["round=0.bak", "backup"])
def test_a_copied_partition_folder_is_an_orphan_and_breaks_nothing(a_copy: Path, name: str) -> None:
    shutil.copytree(a_copy / "rollouts" / "round=0", a_copy / "rollouts" / name)
    kinds = {kind for kind, path in found(a_copy)}
    assert kinds == {"orphan"}
    assert all(path.startswith(f"rollouts/{name}/") for _, path in found(a_copy))
    assert dypo("sql", a_copy, "select count(*) as n from rollouts where round = 0", "--json").stdout == '{"n": 160}\n'


def test_an_older_copy_of_a_superseded_partition_is_named_and_no_harm(a_copy: Path) -> None:
    kept = a_copy / "superseded" / "score" / "set_aside" / "scores" / ".round=0.1"
    shutil.copytree(a_copy / "rollouts" / "round=0", kept)
    assert found(a_copy) == [("older copy", str(kept.relative_to(a_copy)))]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        list(verify(tmp_path, Checked()))
