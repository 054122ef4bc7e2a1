"""A round as a whole: what it writes, how it ends, what it refuses."""

import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import UserError, WorkError
from schemas.recipe import Policy
from schemas.tables import ARROW
from tests.trainer import by_hand
from tests.trainer.tiny import (
    FolderSink,
    Killed,
    make_job,
    make_old,
    make_ref,
    make_shards,
    make_train,
    stored_tensors,
    tiny_llama,
)
from trainer.metrics import effective_sample_size
from trainer.run import train_round
from trainer.schedule import plan_round

QUEUE = {"schedule": "queue", "sft_lr": 2e-2, "queue_size": 2, "queue_groups": 2}


def metric(sink: FolderSink, name: str) -> dict[int, float]:
    return {row["step"]: row["value"] for row in sink.rows("metrics") if row["name"] == name}


def edited(shards: pa.Table, change: dict, where: str = "rl") -> pa.Table:
    """The shards with `change` laid over the first row of a route."""
    rows = shards.to_pylist()
    at = next(i for i, row in enumerate(rows) if row["route"] == where)
    rows[at] |= change
    return pa.Table.from_pylist(rows, ARROW["shards"])


# ---------------------------------------------------------------- what is written
def test_the_names_of_the_metrics_are_those_that_the_documentation_lists(policy_folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    written: set[str] = set()
    care = {"grpo": {"old": "trainer", "truncation": "token"}}
    for name, method in {"joint": {}, "queue": QUEUE, "care": care, "bridge": {"type": "bridge"}}.items():
        sink = FolderSink(tmp_path / name)
        train_round(make_job(policy_folder, sink, train=make_train(method)))
        written |= {row["name"] for row in sink.rows("metrics")}
    assert written == listed


def test_draws_say_what_each_step_was_trained_on(policy_folder: Path, tmp_path: Path) -> None:
    shards, train, sink = make_shards(), make_train(), FolderSink(tmp_path)
    aged = shards.set_column(0, ARROW["shards"].field("round"), pa.array([2] * len(shards), pa.int32()))
    train_round(make_job(policy_folder, sink, shards=aged, ref=make_ref(aged), round=2, rounds=3))
    teachers = {row["item_id"]: row["teacher"] for row in shards.to_pylist()}
    want = [
        (step.index, position, item, route, teachers[item])
        for step in plan_round(aged, train, seed=3, round=2)
        for position, (route, item) in enumerate(key for u in step.updates for v in u.visits for key in v.items)
    ]
    got = sink.rows("draws")
    assert [(r["step"], r["position"], r["item_id"], r["route"], r["teacher"]) for r in got] == want
    assert {(r["round"], r["age"]) for r in got} == {(2, 2)}
    assert set(metric(sink, "age").values()) == {2.0}


def test_denominators_are_counted_over_the_whole_step(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    train_round(make_job(policy_folder, sink, train=make_train(micro_batch_tokens=1)))
    shards = {row["item_id"]: row for row in make_shards().to_pylist()}
    for step in range(6):
        drawn = [shards[r["item_id"]] for r in sink.rows("draws") if r["step"] == step]
        hard, mid = [r for r in drawn if r["route"] == "sft"], [r for r in drawn if r["route"] == "rl"]
        assert metric(sink, "denom/prompts")[step] == 4
        assert metric(sink, "denom/rows")[step] == len(drawn)
        assert metric(sink, "denom/groups")[step] == len({r["prompt_id"] for r in mid})
        assert metric(sink, "denom/sft_tokens")[step] == sum(len(r["tokens"]) for r in hard)
        assert metric(sink, "denom/rl_tokens")[step] == sum(len(r["tokens"]) for r in mid)
        assert metric(sink, "offline_ratio")[step] == len(hard) / 4
    assert metric(sink, "route/easy_frac")[0] == pytest.approx(0.2)


def test_a_checkpoint_is_a_hugging_face_folder_with_the_start_s_tokenizer_files(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    train_round(make_job(policy_folder, sink))
    folder = sink.checkpoints()[6]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (policy_folder / name).read_bytes()
    assert not (folder / "manifest.json").exists()
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert json.loads((folder / "trainer" / "state.json").read_text())["ended"] == "steps"
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja"}


def test_the_stop_tokens_of_a_checkpoint_are_the_start_s_own_or_none(policy_folder: Path, tmp_path: Path) -> None:
    """generation_config.json: the start's bytes if it has one; transformers would make one up from config.json."""
    own = '{"eos_token_id": [1, 7], "transformers_version": "4.0.0"}\n'
    for name, text in (("own", own), ("none", None)):
        start = tmp_path / name / "start"
        shutil.copytree(policy_folder, start)
        (start / "generation_config.json").unlink()
        if text is not None:
            (start / "generation_config.json").write_text(text)
        sink = FolderSink(tmp_path / name / "round")
        train_round(make_job(start, sink, train=make_train(steps=1)))
        made = sink.checkpoints()[1] / "generation_config.json"
        assert (made.read_text() if made.exists() else None) == text


def test_the_run_s_base_policy_brings_weights_only_even_if_it_was_trained_before(
    policy_folder: Path, tmp_path: Path
) -> None:
    before = FolderSink(tmp_path / "before")
    train_round(make_job(policy_folder, before))
    used = before.checkpoints()[6]
    (used / "trainer" / "state.json").write_text('{"version": 99}')
    bare = tmp_path / "bare"
    shutil.copytree(used, bare, ignore=shutil.ignore_patterns("trainer"))
    ends, rates = [], []
    for name, start in (("used", used), ("bare", bare)):
        sink = FolderSink(tmp_path / name)
        train_round(make_job(start, sink))
        folder = sink.checkpoints()[6]
        ends.append(load_file(folder / "model.safetensors") | stored_tensors(folder))
        rates.append(metric(sink, "lr"))
    assert rates[0] == rates[1]
    assert {v.item() for n, v in ends[0].items() if n.endswith("/step")} == {6.0}
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(UserError, match="version 99"):
        train_round(make_job(used, FolderSink(tmp_path / "next"), round=1))


def test_progress_is_told_and_nothing_is_printed(
    policy_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = FolderSink(tmp_path)
    train_round(make_job(policy_folder, sink))
    assert [(done, total) for done, total, _ in sink.notes] == [(i, 6) for i in range(1, 7)]
    assert all("loss" in note for _, _, note in sink.notes)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---------------------------------------------------------------- how it ends
def test_training_lowers_the_loss_on_traces(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    shards = make_shards(hard=2, mid=0, teachers=1, traces=1)
    train_round(make_job(policy_folder, sink, shards=shards, train=make_train(steps=12, prompts_per_step=2)))
    loss = metric(sink, "loss/sft")
    assert loss[11] < 0.7 * loss[0]
    assert not metric(sink, "loss/grpo")
    assert set(metric(sink, "denom/groups").values()) == {0.0}


def test_a_round_ends_early_when_too_few_samples_are_effective_and_stays_ended(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    train = make_train(min_ess=0.99, checkpoint_every=50)
    end = train_round(make_job(policy_folder, sink, train=train, shards=make_shards(hard=0)))
    assert (end.steps, end.reason) == (1, "ess")
    assert metric(sink, "ess")[0] < 0.99
    assert sink.checkpoints().keys() == {1}
    again = train_round(make_job(policy_folder, FolderSink(tmp_path), train=train, shards=make_shards(hard=0)))
    assert again == end
    hard_only = train_round(make_job(policy_folder, FolderSink(tmp_path / "hard"), train=train, shards=make_shards(mid=0)))
    assert hard_only.reason == "steps", "steps without rl rows have no effective sample size"


@pytest.mark.parametrize(("off_by", "reason"), [("row", "steps"), ("token", "ess")])
def test_the_floor_is_on_the_samples_by_token_not_by_row(
    off_by: str, reason: str, policy_folder: Path, tmp_path: Path
) -> None:
    """Ratios all near 1 whose product over a row is not, and ratios far from 1 whose product over a row is 1."""
    rows, model = [], tiny_llama()
    for row in make_shards(hard=0, mid=2).to_pylist():
        row["tokens"] = [*range(3, 31), 5, 1]
        logps = by_hand.forward_alone(model, row)[0].tolist()
        off = [0.1 if row["sample"] % 2 else -0.1] * 30 if off_by == "row" else [1.0, -1.0] * 15
        rows.append(row | {"old_logprobs": [x - d for x, d in zip(logps, off, strict=True)]})
    shards, sink = pa.Table.from_pylist(rows, ARROW["shards"]), FolderSink(tmp_path)
    train = make_train({"lr": 1e-12}, steps=2, prompts_per_step=2, min_ess=0.8)
    assert train_round(make_job(policy_folder, sink, shards=shards, train=train)).reason == reason
    ess, by_row = metric(sink, "ess")[0], metric(sink, "ess_sequence")[0]
    assert (ess > 0.9 and by_row < 0.7) if off_by == "row" else (ess < 0.7 and by_row > 0.9)


def test_no_rows_at_all_publishes_the_policy_unchanged(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    end = train_round(make_job(policy_folder, sink, shards=ARROW["shards"].empty_table()))
    assert (end.steps, end.reason) == (0, "empty")
    start = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(sink.checkpoints()[0]).state_dict().items():
        assert torch.equal(value, start[name])
    assert train_round(make_job(policy_folder, FolderSink(tmp_path), shards=ARROW["shards"].empty_table())) == end


def test_a_step_without_updates_leaves_the_weights_alone_and_says_so(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    train = make_train(QUEUE | {"queue_size": 50, "queue_groups": 50}, steps=2)
    assert train_round(make_job(policy_folder, sink, train=train)).steps == 2
    assert set(metric(sink, "denom/prompts").values()) == {0.0}
    assert not metric(sink, "loss/total")
    start = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(sink.checkpoints()[2]).state_dict().items():
        assert torch.equal(value, start[name])


def test_two_queues_use_two_optimizers_with_their_own_rates(policy_folder: Path, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    train_round(make_job(policy_folder, sink, train=make_train(QUEUE)))
    sft, main = metric(sink, "lr_sft"), metric(sink, "lr")
    both = sft.keys() & main.keys()
    assert both
    assert all(sft[step] == pytest.approx(2 * main[step]) for step in both)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"group_size": 5}, "rl", "group of prompt m0 has 4 members and says group_size 5"),
        ({"old_logprobs": [-1.0]}, "rl", "item m0-rl--0 has 1 old_logprobs"),
        ({"temperature": 0.0}, "rl", "temperature 0.0"),
        ({"w_gal": 0.5}, "rl", "several w_gal"),
        ({"tokens": []}, "sft", "0 response tokens"),
        ({"route": "both"}, "sft", "expected sft or rl"),
        ({"item_id": "h0-sft-t0-1"}, "sft", "is there twice"),
    ],
)
def test_shards_that_cannot_be_trained_on_are_refused_by_row(
    change: dict, where: str, message: str, policy_folder: Path, tmp_path: Path
) -> None:
    shards = edited(make_shards(), change, where)
    with pytest.raises(UserError, match=message):
        train_round(make_job(policy_folder, FolderSink(tmp_path), shards=shards, ref=make_ref(make_shards())))


def test_missing_or_foreign_reference_log_probs_are_refused(policy_folder: Path, tmp_path: Path) -> None:
    ref = make_ref(make_shards())
    with pytest.raises(UserError, match="none were given"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), ref=None))
    with pytest.raises(UserError, match="no row for the shard's item m0-rl--0"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), ref=ref.slice(1)))
    colder = make_ref(make_shards(temperature=0.5))
    with pytest.raises(UserError, match=r"at temperature 0\.5"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), ref=colder))
    by_trainer = make_train({"grpo": {"old": "trainer"}})
    with pytest.raises(UserError, match=r"role old.*none were given"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), old=None, train=by_trainer))
    with pytest.raises(UserError, match=r"\(role old\): no row for the shard's item m0-rl--0"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), old=make_old(make_shards()).slice(1), train=by_trainer))
    for_kl = make_train({"gal": {"ref": "none"}, "grpo": {"kl": 0.1}})
    with pytest.raises(UserError, match=r"role ref.*none were given"):
        train_round(make_job(policy_folder, FolderSink(tmp_path), ref=None, train=for_kl))
    reference_free = make_train({"gal": {"ref": "none"}})
    assert train_round(make_job(policy_folder, FolderSink(tmp_path), ref=None, train=reference_free)).steps == 6


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_item(
    policy_folder: Path, tmp_path: Path
) -> None:
    rows = make_shards().to_pylist()
    bad = next(row for row in rows if row["prompt_id"] == "m2")
    bad["old_logprobs"] = [math.nan] * len(bad["tokens"])
    shards = pa.Table.from_pylist(rows, ARROW["shards"])
    sink = FolderSink(tmp_path)
    train = make_train(checkpoint_every=1)
    with pytest.raises(WorkError, match=bad["item_id"]) as caught:
        train_round(make_job(policy_folder, sink, shards=shards, ref=make_ref(make_shards()), train=train))
    plan = plan_round(shards, train, seed=3, round=0)
    first = next(s.index for s in plan if any(v.prompt_id == "m2" for u in s.updates for v in u.visits))
    assert f"step {first}:" in str(caught.value)
    assert max(sink.checkpoints(), default=0) == first


# ---------------------------------------------------------------- the sampler's log-probs against the trainer's
def sampled(shift: float = 0.0, **change: object) -> pa.Table:
    """Shards whose old log-probs are the tiny policy's own, moved by `shift` in turn up and down."""
    model, rows = tiny_llama(), make_shards().to_pylist()
    for row in rows:
        if row["route"] == "rl":
            logps = by_hand.forward_alone(model, row)[0].tolist()
            row["old_logprobs"] = [x + (-shift if t % 2 else shift) for t, x in enumerate(logps)]
        row |= change
    return pa.Table.from_pylist(rows, ARROW["shards"])


def test_right_after_sampling_the_ratio_is_one_and_the_round_goes_on(policy_folder: Path, tmp_path: Path) -> None:
    """ALGORITHMS test 23: nothing is left but float32's rounding. Later steps move away from the sampler as they should."""
    sink = FolderSink(tmp_path)
    train = make_train(max_logprob_difference=1e-5)
    assert train_round(make_job(policy_folder, sink, shards=sampled(), train=train)).steps == 6
    ratios = {s: [abs(r["log_ratio"]) for r in sink.rows("draws") if r["step"] == s and r["route"] == "rl"] for s in (0, 5)}
    assert max(ratios[0]) < 1e-5 < 1e-3 < max(ratios[5])


@pytest.mark.parametrize("old", ["sampler", "trainer"])
def test_rollouts_that_the_trainer_does_not_recognise_are_refused_before_the_first_update(
    old: str, policy_folder: Path, tmp_path: Path
) -> None:
    """Also where the ratio is against the trainer's own: the difference is to who sampled."""
    sink, shards = FolderSink(tmp_path), sampled(0.3)
    train = make_train({"grpo": {"old": old}}, max_logprob_difference=0.29, checkpoint_every=1)
    with pytest.raises(WorkError, match=r"round 0, step 0: .* by 0\.3 nats .* = 0\.29; .*m\d-rl--\d \(0\.3\)"):
        train_round(make_job(policy_folder, sink, shards=shards, train=train))
    assert not sink.checkpoints()
    told = train.model_copy(update={"max_logprob_difference": 0.31})
    assert train_round(make_job(policy_folder, sink, shards=shards, train=told)).steps == 6


def test_only_rollouts_of_this_round_before_its_first_update_are_held_against_the_trainer(
    policy_folder: Path, tmp_path: Path
) -> None:
    strict = {"max_logprob_difference": 1e-6}
    older = sampled(0.3, round=2, source_round=1)
    train = make_train(**strict)
    assert train_round(make_job(policy_folder, FolderSink(tmp_path / "old"), shards=older, round=2, train=train)).steps == 6
    # the RL update of a step comes after its SFT update: the policy has moved, so nothing can be said
    queue = make_train(QUEUE, prompts_per_step=8, **strict)
    first = plan_round(make_shards(), queue, seed=3, round=0)[0]
    assert [u.optimizer for u in first.updates] == ["sft", "main"]
    assert train_round(make_job(policy_folder, FolderSink(tmp_path / "q"), shards=sampled(0.3), train=queue)).steps == 6
    # a round that goes on from a checkpoint has made its first update
    sink = FolderSink(tmp_path / "cut", die=("progress", 3))
    loose = make_train(max_logprob_difference=1.0)
    with pytest.raises(Killed):
        train_round(make_job(policy_folder, sink, shards=sampled(0.3), train=loose))
    assert train_round(make_job(policy_folder, FolderSink(tmp_path / "cut"), shards=sampled(0.3), train=train)).steps == 6


# ---------------------------------------------------------------- precision and threads
def test_bfloat16_is_the_forward_s_and_the_weights_stay_float32(policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.model_validate({"model": policy_folder, "dtype": "bfloat16", "device": "cpu"})
    sink, exact = FolderSink(tmp_path / "bf16"), FolderSink(tmp_path / "fp32")
    train_round(make_job(policy_folder, sink, policy=policy, train=make_train({"lr": 1e-6})))
    train_round(make_job(policy_folder, exact, train=make_train({"lr": 1e-6})))
    loss, want = metric(sink, "loss/total"), metric(exact, "loss/total")
    assert loss[0] != want[0]
    assert loss[0] == pytest.approx(want[0], rel=0.05)
    weights = load_file(sink.checkpoints()[6] / "model.safetensors")
    start = load_file(policy_folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    moved = (weights["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]).abs()
    assert 0 < moved.max() < 1e-4, "an update of 1e-6 would be lost in bfloat16 weights"


def test_the_policy_s_number_of_threads_is_set(policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.model_validate({"model": policy_folder, "device": "cpu", "threads": 2})
    try:
        train_round(make_job(policy_folder, FolderSink(tmp_path), policy=policy, train=make_train(steps=1)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------- numbers
def test_effective_sample_size_is_between_one_over_n_and_one() -> None:
    assert effective_sample_size(torch.zeros(7).numpy()) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([900.0, 0.0, 0.0, 0.0]).numpy()) == pytest.approx(0.25)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert effective_sample_size(weights.log().numpy()) == pytest.approx(36 / (3 * 14))
