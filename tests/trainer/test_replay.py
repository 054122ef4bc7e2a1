"""A step made again is bitwise the step that was made, whatever differs is named, and another loss sees the same rows."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from schemas.recipe import DypoMethod, Train
from schemas.tables import ARROW
from tests.trainer import by_hand
from tests.trainer.tiny import FolderSink, make_job, make_ref, make_shards, make_train
from trainer.job import TrainJob
from trainer.metrics import CLOCKED
from trainer.replay import Replayed, replay_step, weights_digest
from trainer.run import load, train_round

QUEUE = {"schedule": "queue", "sft_lr": 2e-2, "queue_size": 2, "queue_groups": 2}


def train_of(schedule: str, **more: object) -> Train:
    return make_train(QUEUE if schedule == "queue" else {}, prompts_per_step=3, **more)


def stored(sink: FolderSink, table: str) -> pa.Table:
    return pa.Table.from_pylist(sink.rows(table), ARROW[table])


def again(job: TrainJob, step: int, **more: object) -> Replayed:
    """Replays from the rows that the job's sink has, or those in `more`."""
    sink = job.sink
    assert isinstance(sink, FolderSink)
    tables: dict = {name: stored(sink, name) for name in ("draws", "metrics")}
    return replay_step(job, step, **(tables | more))


def with_alpha(job: TrainJob, alpha: float) -> DypoMethod:
    return job.train.method.model_copy(update={"alpha": alpha})


def edited(rows: pa.Table, at: int, change: dict) -> pa.Table:
    found = rows.to_pylist()
    found[at] |= change
    return pa.Table.from_pylist(found, rows.schema)


@pytest.fixture(scope="module")
def trained(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A finished joint round with checkpoints 2, 4 and 6. Read-only by agreement."""
    job = make_job(policy_folder, FolderSink(tmp_path_factory.mktemp("trained")), train=train_of("joint"))
    train_round(job)
    return job


# ---------------------------------------------------------------- as trained
@pytest.mark.parametrize("schedule", ["joint", "queue"])
def test_every_step_of_two_rounds_is_bitwise_what_was_trained(schedule: str, policy_folder: Path, tmp_path: Path) -> None:
    first = make_job(policy_folder, FolderSink(tmp_path / "0"), train=train_of(schedule))
    train_round(first)
    assert isinstance(first.sink, FolderSink)
    second = make_job(first.sink.checkpoints()[6], FolderSink(tmp_path / "1"), train=train_of(schedule), round=1)
    train_round(second)
    for job in (first, second):
        sink = job.sink
        assert isinstance(sink, FolderSink)
        calls = dict(sink.calls)
        for step in range(6):
            got = again(job, step)
            assert got.differences == []
            assert got.start == step // 2 * 2
            assert got.metrics == {
                r["name"]: r["value"] for r in sink.rows("metrics") if r["step"] == step and r["name"] not in CLOCKED
            }
            if step % 2:
                assert got.checkpoint == got.weights == weights_digest(load(job, sink.checkpoints()[step + 1]).lm)
            else:
                assert got.checkpoint is None
            assert (got.changed, got.cosines) == (None, {})
        assert {name for name, n in sink.calls.items() if n != calls.get(name)} == {"progress"}, "replay writes nothing"


def test_a_walk_over_many_steps_is_bitwise_too(trained: TrainJob, policy_folder: Path, tmp_path: Path) -> None:
    job = make_job(policy_folder, FolderSink(tmp_path), train=train_of("joint", checkpoint_every=6))
    train_round(job)
    got = again(job, 5)
    assert (got.start, got.differences) == (0, [])
    assert got.weights == got.checkpoint == again(trained, 5).weights


def test_the_digest_sees_every_weight_and_its_name() -> None:
    model = torch.nn.Linear(2, 2)
    digests = {weights_digest(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        digests.add(weights_digest(model))
    assert len(digests) == 3


# ---------------------------------------------------------------- what is not what it was
def test_a_stored_metric_that_was_altered_in_its_last_bit_is_named(trained: TrainJob) -> None:
    metrics = stored(trained.sink, "metrics")  # type: ignore[arg-type]
    at = next(i for i, r in enumerate(metrics.to_pylist()) if (r["step"], r["name"]) == (3, "loss/total"))
    value = metrics["value"][at].as_py()
    nudged = float(torch.nextafter(torch.tensor(value, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)))
    altered = edited(metrics, at, {"value": nudged})
    (difference,) = again(trained, 3, metrics=altered).differences
    assert (difference.step, difference.name) == (3, "loss/total")
    assert (difference.stored, difference.replayed) == (nudged, value)
    missing = pa.Table.from_pylist([r for i, r in enumerate(metrics.to_pylist()) if i != at], metrics.schema)
    assert [(d.name, d.stored) for d in again(trained, 3, metrics=missing).differences] == [("loss/total", None)]
    clocked = edited(metrics, next(i for i, r in enumerate(metrics.to_pylist()) if r["name"] in CLOCKED), {"value": 1.0})
    assert again(trained, 0, metrics=clocked).differences == []


def test_the_first_step_that_went_otherwise_is_named_before_the_one_asked_for(
    trained: TrainJob, policy_folder: Path, tmp_path: Path
) -> None:
    job = make_job(policy_folder, FolderSink(tmp_path), train=train_of("joint", checkpoint_every=6))
    train_round(job)
    warmer = replace(job, train=job.train.model_copy(update={"method": job.train.method.model_copy(update={"lr": 2e-2})}))
    differences = again(warmer, 3).differences
    assert (differences[0].step, differences[0].name) == (0, "lr")
    assert {d.step for d in differences} == {0, 1, 2, 3}


def test_weights_that_are_not_the_checkpoint_s_are_noticed(policy_folder: Path, tmp_path: Path) -> None:
    job = make_job(policy_folder, FolderSink(tmp_path), train=train_of("joint"))
    train_round(job)
    path = job.sink.checkpoints()[4] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, path, {"format": "pt"})
    got = again(job, 3)
    assert got.differences == []
    assert got.checkpoint not in (None, got.weights)
    assert again(job, 4).differences, "and the step that begins from it goes otherwise"


@pytest.mark.parametrize(
    ("column", "value"), [("item_id", "another"), ("teacher", "t9"), ("prompt_id", "h9"), ("route", "other")]
)
def test_a_draws_row_that_the_plan_does_not_give_is_refused_by_place(column: str, value: str, trained: TrainJob) -> None:
    draws = stored(trained.sink, "draws")  # type: ignore[arg-type]
    at = next(i for i, r in enumerate(draws.to_pylist()) if r["step"] == 1 and r["position"] == 1)
    with pytest.raises(UserError, match=r"draws, round 0, step 1, position 1: .* is stored, but"):
        again(trained, 3, draws=edited(draws, at, {column: value}))
    assert again(trained, 0, draws=edited(draws, at, {column: value})).differences == [], "step 0 does not depend on it"


def test_a_draws_row_too_few_or_too_many_is_refused(trained: TrainJob) -> None:
    rows = stored(trained.sink, "draws").to_pylist()  # type: ignore[arg-type]
    last = max(r["position"] for r in rows if r["step"] == 1)
    short = [r for r in rows if (r["step"], r["position"]) != (1, last)]
    long = [*rows, rows[0] | {"step": 1, "position": last + 1}]
    with pytest.raises(UserError, match=f"step 1, position {last}: no row is stored"):
        again(trained, 2, draws=pa.Table.from_pylist(short, ARROW["draws"]))
    with pytest.raises(UserError, match=f"step 1, position {last + 1}: .* give no row"):
        again(trained, 2, draws=pa.Table.from_pylist(long, ARROW["draws"]))


def test_a_step_that_was_never_made_is_refused(trained: TrainJob) -> None:
    with pytest.raises(UserError, match="no stored metrics of step 6, only of steps 0 to 5"):
        again(trained, 6)


# ---------------------------------------------------------------- as another loss would have made it
def rows_and_weights(job: TrainJob, step: int, folder: Path) -> tuple[torch.nn.Module, list[dict]]:
    """The weights that the step began from, made with a checkpoint after every step, and its rows from the draws."""
    sink = FolderSink(folder)
    train_round(replace(job, sink=sink, train=job.train.model_copy(update={"checkpoint_every": 1})))
    shards = {(r["route"], r["item_id"]): r for r in job.shards.to_pylist()}
    drawn = [shards[r["route"], r["item_id"]] for r in sink.rows("draws") if r["step"] == step]
    return AutoModelForCausalLM.from_pretrained(sink.checkpoints()[step], dtype=torch.float32), drawn


def test_alpha_1_is_sft_and_grpo_alone_by_hand(trained: TrainJob, tmp_path: Path) -> None:
    step, method = 3, with_alpha(trained, 1.0)
    model, rows = rows_and_weights(trained, step, tmp_path)
    assert {r["route"] for r in rows} == {"sft", "rl"}
    got = again(trained, step, method=method)
    assert got.differences == [], "the column as trained stays as trained"
    assert got.changed is not None
    ref = by_hand.reference(make_ref(trained.shards))
    parts = by_hand.losses(by_hand.forward_each(model, rows), rows, ref, method)
    hard = sum(r["route"] == "sft" for r in rows)
    want = hard / 3 * parts["sft"].item() + (3 - hard) / 3 * parts["grpo"].item()
    assert got.changed["loss/total"] == pytest.approx(want, rel=1e-5)
    changed = by_hand.gradient_of(model, rows, ref, method, 3).double()
    as_trained = by_hand.gradient_of(model, rows, ref, trained.train.method, 3).double()
    assert got.changed["grad_norm"] == pytest.approx(changed.norm().item(), rel=1e-4)
    assert got.metrics["grad_norm"] == pytest.approx(as_trained.norm().item(), rel=1e-4)
    cosine = (changed @ as_trained / changed.norm() / as_trained.norm()).item()
    assert cosine < 0.999
    assert got.cosines == {"main": pytest.approx(cosine, abs=1e-5)}


@pytest.mark.parametrize("schedule", ["joint", "queue"])
def test_no_change_gives_the_same_numbers_and_a_cosine_of_1(schedule: str, policy_folder: Path, tmp_path: Path) -> None:
    job = make_job(policy_folder, FolderSink(tmp_path), train=train_of(schedule))
    train_round(job)
    seen = set()
    for step in range(6):
        got = again(job, step, method=job.train.method)
        assert got.changed == got.metrics
        assert set(got.cosines.values()) <= {1.0}
        seen |= got.cosines.keys()
    assert seen == ({"main", "sft"} if schedule == "queue" else {"main"})


def test_a_gradient_of_zero_has_no_cosine(policy_folder: Path, tmp_path: Path) -> None:
    job = make_job(policy_folder, FolderSink(tmp_path), train=train_of("joint"), shards=make_shards(mid=0))
    train_round(job)
    got = again(job, 1, method=job.train.method.model_copy(update={"gamma": 0.0}))
    assert got.cosines == {"main": None}


def test_a_method_that_takes_other_rows_is_refused(trained: TrainJob) -> None:
    queue = DypoMethod.model_validate({"lr": 1e-2} | QUEUE)
    with pytest.raises(UserError, match="would take other rows in step 3"):
        again(trained, 3, method=queue)


def test_a_changed_loss_that_reads_a_reference_needs_it_and_one_that_has_it_uses_it(
    policy_folder: Path, tmp_path: Path
) -> None:
    train = make_train({"gal": {"ref": "none"}}, prompts_per_step=3)
    job = make_job(policy_folder, FolderSink(tmp_path), train=train, ref=None)
    train_round(job)
    init = DypoMethod.model_validate({"lr": 1e-2})
    with pytest.raises(UserError, match="none were given"):
        again(job, 3, method=init)
    got = again(replace(job, ref=make_ref(job.shards)), 3, method=init)
    assert got.differences == []
    assert got.changed is not None
    assert got.changed["loss/gal"] != got.metrics["loss/gal"]
