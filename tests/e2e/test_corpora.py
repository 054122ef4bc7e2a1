"""Samples of public corpora and logs (data/corpora) through the real command: prompts, traces, verdicts, as far as they go."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.context import load
from pipeline.stages import score
from pipeline.store import ask, connect
from tests.tiny_runs import ROOT, dypo, table, write_recipe

CORPORA = ROOT / "data" / "corpora"
OPENR1, TRL = CORPORA / "openr1_math_220k.parquet", CORPORA / "trl_completions"
TRAIN = f'path = "{ROOT}/data/tiny/train.jsonl"'
LEFT = 'name = "left"\nengine = { type = "program", program = "tiny.left" }'
NOISY = 'name = "noisy"\nsamples = 2\nengine = { type = "program", program = "tiny.noisy" }'
SUM = 'verifiers.sum = { type = "exact", extract = "^[^>]*>([0-9]+)$" }'
BOTH = """
select t.prompt_id, t.sample, s.status, cast(t.sampling->'$.recorded.correctness_math_verify' as boolean) as theirs
from traces as t join scores as s on s.kind = 'trace' and s.id = t.trace_id
where t.teacher = 'r1' order by 1, 2
"""


def teacher(name: str, path: Path, samples: int, verdict: str = "") -> str:
    more = f', verdict = "{verdict}"' if verdict else ""
    return f'name = "{name}"\nsamples = {samples}\nengine = {{ type = "replay", path = "{path}"{more} }}'


def sums(tmp_path: Path, taught: str) -> Path:
    return write_recipe(tmp_path, **{TRAIN: f'path = "{OPENR1}"', LEFT: taught})


def test_openr1_math_220k_goes_from_ingest_to_shards_with_our_verdicts_or_its_own(tmp_path: Path) -> None:
    path, run = sums(tmp_path, teacher("r1", OPENR1, 3)), tmp_path / "run"
    dypo("ingest", path)
    assert "24 of 24 records matched, 24 of 24 prompts have a trace" in dypo("generate", "teachers", path).stdout
    dypo("generate", "rollouts", path)
    dypo("score", path)
    found = ask(connect(run), BOTH).to_pylist()
    assert len(found) == pl.read_parquet(OPENR1)["generations"].list.len().sum()
    assert {r["status"] for r in found} == {"ok", "wrong", "truncated"}
    assert all((r["status"] == "ok") == r["theirs"] for r in found)
    dypo("grade", path)
    ours = table(run, "shards")

    path = sums(tmp_path, teacher("r1", OPENR1, 3, "correctness_math_verify"))
    dypo("score", path)
    taken = table(run, "scores").filter(pl.col("teacher") == "r1")
    names = {"recorded.correctness_math_verify": {"ok", "wrong"}, "sum": {"truncated"}}
    assert {k: set(v) for k, v in taken.group_by("verifier").agg("status").iter_rows()} == names
    assert set(table(run, "scores").filter(pl.col("kind") == "rollout")["verifier"]) == {"sum"}
    dypo("grade", path)
    assert table(run, "shards").equals(ours)
    assert ask(connect(run), "select count(*) as n from score_versions where teacher = 'r1'").to_pylist()[0]["n"] == 2 * len(
        found
    )


def test_a_recorded_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = sums(tmp_path, teacher("r1", OPENR1, 3, "correctnes"))
    for stage in ("ingest", "generate"):
        dypo(stage, path)
    got = dypo("score", path, check=False)
    assert got.returncode == 2
    assert "teachers.r1.engine.verdict = 'correctnes': none of its traces has it. Recorded of them: " in got.stderr
    assert "correctness_llama, correctness_math_verify, is_reasoning_complete. Name one of those" in got.stderr


def test_completions_that_trl_logged_are_traces_with_their_rewards_and_never_rollouts(tmp_path: Path) -> None:
    path, run = sums(tmp_path, teacher("policy", TRL, 8, "accuracy_reward")), tmp_path / "run"
    dypo("ingest", path)
    dypo("generate", path)
    dypo("score", path)
    dypo("grade", path)
    traces = table(run, "traces").filter(pl.col("teacher") == "policy")
    assert traces.height == 2 * 12 * 4
    assert sorted(traces.group_by("prompt_id").len()["len"].unique()) == [4, 8]  # the steps share six prompts
    recorded = [json.loads(s)["recorded"] for s in traces["sampling"]]
    assert {frozenset(r) for r in recorded} == {frozenset({"step", "accuracy_reward", "format_reward", "advantage"})}
    verdicts = traces.join(table(run, "scores"), left_on="trace_id", right_on="id")
    assert (verdicts["reward"] == [json.loads(s)["recorded"]["accuracy_reward"] for s in verdicts["sampling"]]).all()
    assert table(run, "grades")["traces"].sum() > 0
    got = dypo("plan", path, "--set", f"rollouts.engine={{type='replay', path='{TRL}'}}", check=False)
    assert got.returncode == 2
    assert "recorded completions cannot be training rollouts: nobody kept the sampling policy's token ids" in got.stderr


@pytest.mark.parametrize(
    ("problems", "traces", "samples", "verdict", "counts"),
    [
        ("luffy_46k.parquet", "luffy_46k.parquet", 1, "", {"ok": 6}),
        ("verl_math.parquet", "verl_rollouts", 4, "", {"ok": 12, "wrong": 12}),
        ("verl_math.parquet", "verl_rollouts", 4, "score", {"ok": 12, "wrong": 12}),
    ],
)
def test_luffy_and_verl_go_from_ingest_to_verdicts(
    problems: str, traces: str, samples: int, verdict: str, counts: dict[str, int], tmp_path: Path
) -> None:
    changes = {
        TRAIN: f'path = "{CORPORA / problems}"',
        LEFT: teacher("recorded", CORPORA / traces, samples, verdict),
        NOISY: teacher("again", CORPORA / traces, 1),
        SUM: 'verifiers.sum = { type = "math" }',
    }
    path = write_recipe(tmp_path, **changes)
    dypo("ingest", path)
    dypo("generate", "teachers", path)
    ctx = load(path)
    (outcome,) = score.run(ctx, [("trace", ctx.part("traces", teacher="recorded"))])
    assert outcome.facts["statuses"] == counts
