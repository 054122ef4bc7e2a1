"""`probe variance` in the trainer: each gradient against the objective by hand, the halves' statistics, the whole result."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.errors import UserError, WorkError
from schemas.recipe import DypoMethod, Policy
from schemas.tables import ARROW
from tests.trainer import by_hand
from tests.trainer.tiny import ExactLM, make_ref, make_shards, make_train
from trainer import probe
from trainer.losses import grpo_advantages
from trainer.model import PolicyLM
from trainer.probe import MIN_PROMPTS, SPLITS, VarianceJob, part_gradients, probe_variance, random_splits, split_chance
from trainer.rows import Shards
from trainer.variance import Interval, split_moments

K = 8
Gradient = Callable[[list[dict], str], np.ndarray]


def job_of(shards: pa.Table, method: dict | None = None, **more: object) -> VarianceJob:
    fields: dict = {
        "round": 0,
        "seed": 3,
        "train": make_train(method),
        "policy": Policy(model=Path("nowhere"), device="cpu"),
        "folder": Path("nowhere"),
        "base": Path("nowhere"),
        "shards": shards,
        "ref": make_ref(shards),
        "prompts": 100,
        "sketch": 10**6,
    }
    return VarianceJob(**(fields | more))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ExactLM:
    """A float64 model in place of whatever would be loaded."""
    model = ExactLM()
    monkeypatch.setattr(probe, "load_model", lambda folder, policy: PolicyLM(model))
    return model


def by_prompt(shards: pa.Table, route: str) -> dict[str, list[dict]]:
    rows = sorted((r for r in shards.to_pylist() if r["route"] == route), key=lambda r: r["sample"])
    return {p: [r for r in rows if r["prompt_id"] == p] for p in sorted({r["prompt_id"] for r in rows})}


def gradient_by_hand(model: ExactLM, rows: list[dict], name: str, ref: pa.Table, method: DypoMethod) -> np.ndarray:
    """Of one component of these rows as the whole of an update."""
    model.zero_grad()
    by_hand.losses(by_hand.forward_each(model, rows), rows, by_hand.reference(ref), method)[name].backward()
    found = by_hand.gradient(model).numpy().copy()
    model.zero_grad()
    return found


def flat(grads: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([g.flatten() for g in grads]).numpy()


@pytest.mark.parametrize(
    "settings",
    [{}, {"gal": {"ref": "none", "logp_reduction": "sum", "beta": 0.3}}, {"preset": "official"}, {"gal": {"ref": "old"}}],
)
def test_the_gradient_of_a_prompt_and_of_its_halves_is_the_objectives_by_hand(settings: dict) -> None:
    shards, model = make_shards(hard=1, mid=4, k=K, teachers=1, traces=1), ExactLM()
    ref, method = make_ref(shards), DypoMethod.model_validate(settings)
    looked_up = Shards(shards, ref if method.loss.needs_reference else None)
    group = by_prompt(shards, "rl")["m3"]  # 4 of 8 right
    unit = looked_up.rows([("rl", r["item_id"]) for r in group])
    half = [0, 2, 5, 7]
    parts = [(range(K), unit), probe._half(unit, half, method.loss)]
    found = {(n, name): flat(g) for n, name, g in part_gradients(PolicyLM(model), unit, parts, ["grpo", "gal"], method.loss)}
    rewards = [group[i]["reward"] for i in half]
    advantages = grpo_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    alone = [group[i] | {"advantage": a} for i, a in zip(half, advantages, strict=True)]
    for name in ("grpo", "gal"):
        for number, rows in enumerate((group, alone)):
            expected = gradient_by_hand(model, rows, name, ref, method)
            assert np.linalg.norm(expected) > 1e-3
            np.testing.assert_allclose(found[number, name], expected, rtol=0, atol=1e-9)
    (trace,) = by_prompt(shards, "sft")["h0"]
    unit = looked_up.rows([("sft", trace["item_id"])])
    ((_, _, grads),) = part_gradients(PolicyLM(model), unit, [(range(1), unit)], ["sft"], method.loss)
    np.testing.assert_allclose(flat(grads), gradient_by_hand(model, [trace], "sft", ref, method), rtol=0, atol=1e-9)


def on_policy(model: ExactLM, shards: pa.Table) -> pa.Table:
    """The same rows with the model's own log-probs as the sampler's, and groups of one success rate."""
    rows = []
    for group in by_prompt(shards, "rl").values():
        rewards = [float(i < 3) for i in range(len(group))]
        advantages = grpo_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
        for row, reward, advantage in zip(group, rewards, advantages, strict=True):
            old = by_hand.forward_alone(model, row)[0].detach().tolist()
            more = {"reward": reward, "correct": reward > 0, "advantage": advantage, "old_logprobs": old}
            rows.append(row | more)
    return pa.Table.from_pylist(rows, ARROW["shards"])


def test_on_policy_with_the_sampler_as_reference_gal_is_a_multiple_of_grpo(exact: ExactLM) -> None:
    shards = on_policy(exact, make_shards(hard=0, mid=12, k=K))
    found = probe_variance(job_of(shards, {"gal": {"ref": "old"}}))
    rate = 3 / K
    multiple = 0.5 / np.sqrt(rate * (1 - rate) * (K - 1) / K)  # ALGORITHMS section 1: beta / 2 over GRPO's own scalar
    measured = np.sqrt(found["components"]["gal"]["trace_cov"]["value"] / found["components"]["grpo"]["trace_cov"]["value"])
    assert measured == pytest.approx(multiple, rel=1e-4)
    assert found["eq19"]["noise_correlation"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["eq19"]["variance_ratio"]["value"] == pytest.approx((0.5 + 0.5 * multiple) ** 2, rel=1e-4)
    assert found["eq19"]["if_independent"]["value"] == pytest.approx(0.25 + 0.25 * multiple**2, rel=1e-4)
    directions = [found["components"][n]["direction_variance"]["value"] for n in ("grpo", "gal", "mix")]
    assert directions == pytest.approx([directions[0]] * 3, abs=1e-6)


def test_with_a_reference_that_lags_the_two_are_no_multiples(exact: ExactLM) -> None:
    found = probe_variance(job_of(on_policy(exact, make_shards(hard=0, mid=12, k=K)), {"gal": {"beta": 20.0}}))
    assert 0.3 < found["eq19"]["noise_correlation"]["value"] < 0.999


def test_the_whole_result_is_the_definitions_over_gradients_by_hand(exact: ExactLM) -> None:
    shards = make_shards(hard=11, mid=12, k=K, teachers=1, traces=1)
    job = job_of(shards, {"alpha": 0.3})
    found, method = probe_variance(job), job.train.method
    assert job.ref is not None
    grads = {
        name: np.array([gradient_by_hand(exact, g, name, job.ref, method) for g in by_prompt(shards, route).values()])
        for route, names in (("sft", ["sft"]), ("rl", ["grpo", "gal"]))
        for name in names
    }
    grads["mix"] = 0.3 * grads["grpo"] + 0.7 * grads["gal"]
    trace = {n: np.trace(np.cov(g.T)) for n, g in grads.items()}
    square = {n: g.mean(0) @ g.mean(0) - trace[n] / len(g) for n, g in grads.items()}
    assert set(found["components"]) == set(grads)
    for name, numbers in found["components"].items():
        assert numbers["prompts"] == len(grads[name])
        assert numbers["trace_cov"]["value"] == pytest.approx(trace[name], rel=1e-6)
        assert numbers["signal"]["value"] == pytest.approx(square[name], rel=1e-6)
        assert numbers["trace_cov"]["ci_low"] < trace[name] < numbers["trace_cov"]["ci_high"]
    pairs = {(p["a"], p["b"]): p for p in found["pairs"]}
    assert set(pairs) == {("grpo", "gal"), ("grpo", "mix"), ("gal", "mix"), ("grpo", "sft"), ("gal", "sft"), ("mix", "sft")}
    for (a, b), pair in pairs.items():
        product = grads[a].mean(0) @ grads[b].mean(0)
        if b != "sft":
            covariance = np.cov(grads[a].T, grads[b].T)[: grads[a].shape[1], grads[a].shape[1] :].trace()
            product -= covariance / len(grads[a])
            assert pair["noise_correlation"]["value"] == pytest.approx(covariance / np.sqrt(trace[a] * trace[b]), rel=1e-6)
        else:
            assert pair["noise_correlation"] is None
        if square[a] > 0 and square[b] > 0:
            assert pair["cosine"]["value"] == pytest.approx(
                np.clip(product / np.sqrt(square[a] * square[b]), -1, 1), rel=1e-6
            )
    assert found["eq19"]["variance_ratio"]["value"] == pytest.approx(trace["mix"] / trace["grpo"], rel=1e-6)
    assert found["weights"] == pytest.approx({"grpo": 0.3, "gal": 0.7})
    assert found["sketch"] is None
    json.dumps(found, allow_nan=False)


def test_the_sketch_is_near_the_exact_gradients(exact: ExactLM) -> None:
    shards = make_shards(hard=11, mid=14, k=K)
    whole = probe_variance(job_of(shards))
    width = whole["parameters"] - 1
    near = probe_variance(job_of(shards, sketch=width))
    assert near["sketch"] == width
    for name, numbers in whole["components"].items():
        true, found = numbers["trace_cov"]["value"], near["components"][name]["trace_cov"]["value"]
        assert 0 < abs(found / true - 1) < 5 * np.sqrt(2 / width), name
    for key in ("variance_ratio", "noise_correlation"):
        assert near["eq19"][key]["value"] == pytest.approx(whole["eq19"][key]["value"], rel=0.05)


def test_a_gal_weight_is_the_mix_that_is_measured_and_no_gal_means_no_mix(exact: ExactLM) -> None:
    shards = make_shards(hard=0, mid=14, k=K)
    assert probe_variance(job_of(shards, {"gal_weight": 0.1}))["weights"] == {"grpo": 1.0, "gal": 0.1}
    found = probe_variance(job_of(shards, {"alpha": 1.0}))
    assert set(found["components"]) == {"grpo"}
    assert found["eq19"] is None
    assert found["sampling"]["eq19"] is None
    assert set(found["sampling"]["components"]) == {"grpo"}


# ---------------------------------------------------------------- halves
def test_the_chance_of_two_mixed_halves_is_a_count_of_all_halvings() -> None:
    for k in (2, 4, 6, 8):
        for successes in range(k + 1):
            right = [i < successes for i in range(k)]
            halves = [set(h) for h in itertools.combinations(range(k), k // 2)]
            mixed = [h for h in halves if all(0 < sum(right[i] for i in half) < k // 2 for half in (h, set(range(k)) - h))]
            assert split_chance(k, successes) == pytest.approx(len(mixed) / len(halves))


def test_splits_are_seeded_uniform_over_the_mixed_halvings_and_none_where_there_are_none() -> None:
    right = [True, True, False, False, False, False]
    found = random_splits(right, 6000, seed=1)
    seen = {tuple(first): 0 for first, _ in found}
    for first, second in found:
        assert sorted(first + second) == list(range(6))
        assert sum(right[i] for i in first) == sum(right[i] for i in second) == 1
        seen[tuple(first)] += 1
    assert len(seen) == 12  # 20 halvings, 8 of them with both right ones on one side
    assert all(400 < times < 600 for times in seen.values())
    assert random_splits(right, 5, seed=1) == found[:5]
    assert random_splits(right, 5, seed=2) != found[:5]
    for none in ([True] * 6, [True] + [False] * 5, [True, False], [True, True, False]):
        assert random_splits(none, 3, seed=0) == []


def test_the_halves_noise_and_signal_are_those_of_fresh_groups_of_half_the_size_that_are_mixed() -> None:
    """Two kinds of prompts; a toy "gradient" of a group that is GRPO-like. Truth: many fresh pairs of mixed groups of k / 2."""
    rng = np.random.default_rng(0)
    rates, directions, k = (0.25, 0.6), (np.array([1.0, 0.0]), np.array([0.3, -2.0])), 6

    def sample(kind: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        right = rng.random(size) < rates[kind]
        return right, rng.standard_normal((size, 2)) + np.where(right[:, None], directions[kind], 0)

    def gradient(right: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return rows[right].mean(0) - rows[~right].mean(0)

    noise, signal = [], []
    while len(noise) < 6000:
        kind = int(rng.integers(2))
        two = [sample(kind, k // 2) for _ in range(2)]
        if all(0 < right.sum() < k // 2 for right, _ in two):
            a, b = (gradient(*of) for of in two)
            noise.append((a - b) @ (a - b) / 2)
            signal.append(a @ b)

    halves = probe.Halves()
    while len(halves.chance) < 4000:
        right, rows = sample(int(rng.integers(2)), k)
        if splits := random_splits(right.tolist(), 2, seed=len(halves.chance)):
            found = [{"grpo": gradient(right[at], rows[at])} for pair in splits for at in pair]
            probe._add_halves(halves, found, right.tolist())
            assert halves.chance[-1] == split_chance(k, int(right.sum()))
    pair = ("grpo", "grpo")
    of = split_moments(
        *({pair: np.array(v[pair])} for v in (halves.noise, halves.signal)), np.array(halves.chance), np.ones((1, 4000))
    )
    for truth, values in ((noise, of.noise[pair][0]), (signal, of.signal[pair][0])):
        error = np.std(truth) * np.sqrt(1 / len(truth) + 1 / 4000)
        assert abs(values - np.mean(truth)) < 4 * error


# ---------------------------------------------------------------- which prompts, and what is refused
def test_prompts_limit_each_route_to_the_first_of_the_rounds_order(exact: ExactLM) -> None:
    shards = make_shards(hard=15, mid=16, k=4)
    visits, gated = probe._chosen(job_of(shards, prompts=12))
    everything, _ = probe._chosen(job_of(shards))
    assert gated == {"rl": 16, "sft": 15}
    for route in ("rl", "sft"):
        chosen = [v for v in visits if v.route == route]
        assert len(chosen) == 12
        assert chosen == [v for v in everything if v.route == route][:12]
    found = probe_variance(job_of(shards, prompts=12))
    assert found["prompts"] == {"rl": 12, "sft": 12}
    assert found["gated"] == gated


def test_the_order_of_the_rows_changes_nothing_and_a_second_run_says_the_same(exact: ExactLM) -> None:
    shards = make_shards(hard=12, mid=14, k=K)
    turned = shards.take(pa.array(np.random.default_rng(0).permutation(len(shards))))
    told: list[tuple[int, int]] = []
    first = probe_variance(replace(job_of(shards), tell=lambda done, total: told.append((done, total))))
    assert probe_variance(job_of(turned, ref=make_ref(shards))) == first
    assert told == [(done, 26) for done in range(1, 27)]
    assert first["sampling"]["splits"] == SPLITS
    assert first["sampling"]["group_sizes"] == [K // 2]


def test_a_route_with_too_few_prompts_is_left_out_and_none_at_all_is_refused(exact: ExactLM) -> None:
    found = probe_variance(job_of(make_shards(hard=MIN_PROMPTS - 1, mid=MIN_PROMPTS, k=4)))
    assert found["prompts"] == {"rl": MIN_PROMPTS, "sft": 0}
    assert "sft" not in found["components"]
    assert set(probe_variance(job_of(make_shards(hard=MIN_PROMPTS, mid=2)))["components"]) == {"sft"}
    for shards in (make_shards(hard=9, mid=8), make_shards(hard=0, mid=0)):
        with pytest.raises(UserError, match=f"at least {MIN_PROMPTS} of a route"):
            probe_variance(job_of(shards))
    with pytest.raises(UserError, match=r"20 Mid prompts .* at most 3 of each"):
        probe_variance(job_of(make_shards(hard=0, mid=20), prompts=3))


def test_missing_reference_log_probs_are_computed_from_the_base_policy(policy_folder: Path) -> None:
    shards = make_shards(hard=0, mid=MIN_PROMPTS, k=4)
    policy = Policy(model=policy_folder, device="cpu")
    fields = {"policy": policy, "folder": policy_folder, "base": policy_folder}
    computed = probe_variance(job_of(shards, ref=None, **fields))
    tables = list(probe.reference_logprobs(policy_folder, shards, policy, 10_000))
    stored = probe_variance(job_of(shards, ref=pa.concat_tables(tables), **fields))
    for name, numbers in stored["components"].items():
        assert computed["components"][name]["trace_cov"] == pytest.approx(numbers["trace_cov"], rel=1e-4)
    assert probe_variance(job_of(shards, **fields))["components"]["gal"] != stored["components"]["gal"]


@pytest.mark.parametrize("other", [{"method": {"grpo": {"old": "trainer"}}}, {"lora": {"rank": 2}}], ids=["old", "lora"])
def test_a_run_whose_gradient_is_another_one_is_refused_before_the_model_is_loaded(other: dict) -> None:
    train = make_train(other.get("method"), **{key: value for key, value in other.items() if key != "method"})
    with pytest.raises(UserError, match=r"not with grpo\.old = 'trainer' or train\.lora"):
        probe_variance(job_of(make_shards(), train=train))


def test_a_gradient_that_is_not_finite_stops_the_probe_and_names_the_prompt(exact: ExactLM) -> None:
    shards = make_shards(hard=0, mid=12, k=4)
    rows = shards.to_pylist()
    rows[0]["advantage"] = float("nan")
    with pytest.raises(WorkError, match=rf"prompt {rows[0]['prompt_id']} is not finite"):
        probe_variance(job_of(pa.Table.from_pylist(rows, ARROW["shards"])))


def test_an_interval_is_written_as_json_values() -> None:
    assert vars(Interval(1.0, None, 2.0)) == {"value": 1.0, "ci_low": None, "ci_high": 2.0}
