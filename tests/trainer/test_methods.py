"""Every rival's loss against its formula written out row by row, its published defaults, and the invariances that all share.

The formulas here are those of ALGORITHMS section 3 in plain loops over the tables' rows: full logits, no mask, no packing.
"""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from schemas.methods import AnyMethod, Method
from schemas.tables import ARROW
from tests.trainer import by_hand
from tests.trainer.by_hand import gradient
from tests.trainer.tiny import accumulate_as, exact_llama, make_ref, make_shards, policy_lm, shard_row, tokens_of
from trainer.losses import entropy_weights, flat_alignment, group_alignment, off_policy_surrogate, phi_weights
from trainer.objective import Unit, count, mixture, silent
from trainer.rows import Shards

K = 4
HORIZON = {"grpo": {"horizon": 50}}
NAMES: dict[str, dict] = {
    "sft": {},
    "grpo": {},
    "dr_grpo": HORIZON,
    "dapo": {},
    "gspo": {},
    "cispo": {},
    "uniform_mix": HORIZON | {"sft_weight": 0.7},
    "superrl": {},
    "hpt": HORIZON | {"sft_weight": 0.3},
    "luffy": HORIZON,
    "srft": {},
    "chord": {"mu_peak": 0.6},
    "chord_phi": {"type": "chord", "variant": "phi"},
    "bridge": {"rl_weight": 0.3},
    "opd": {"teacher": "somewhere"},
    "prism": {"sft_rounds": 0},
    "grpo_flat": {"alpha": 0.3, "beta": 0.8},
}


def method_of(name: str) -> Method:
    return TypeAdapter(AnyMethod).validate_python({"type": name} | NAMES.get(name, {}))


def table_of(name: str, seed: int = 0) -> pa.Table:
    """Rows as this method's routing gives them: four Mid groups, an Easy and a Hard one, traces where it takes them."""
    rng, method = np.random.default_rng(seed), method_of(name)
    routing, scale = method.routing(0), method.loss.grpo.advantage
    rows = []
    for number, right in enumerate([1, 2, 3, 1, K, 0]):
        prompt_id, grade = f"p{number}", "hard" if right == 0 else "easy" if right == K else "mid"
        prompt = rng.integers(3, 32, int(rng.integers(2, 7))).tolist()
        grouped, traced = grade in routing.rl, grade in routing.sft or (routing.union and number != 3)
        member = routing.union and grouped and traced  # p3 has no trace: its group is the rollouts alone
        rewards = np.array([float(i < right) for i in range(K)] + [1.0] * member)
        flat = rewards.min() == rewards.max()
        spread = rewards.std(ddof=1) + 1e-6 if scale == "std" else 1.0
        advantages = np.zeros(len(rewards)) if flat else (rewards - rewards.mean()) / spread
        for s in range(K if grouped else 0):
            tokens = tokens_of(rng, 1, 9)
            old = (-3.5 + 0.3 * rng.standard_normal(len(tokens))).tolist()
            rows.append(
                shard_row(
                    "rl", prompt_id, s, prompt, tokens, temperature=0.7, old_logprobs=old, reward=rewards[s],
                    correct=bool(rewards[s]), advantage=advantages[s], group_size=len(rewards),
                    finish_reason="length" if s == 3 else "stop",
                )
            )  # fmt: skip
        if traced:
            more = {"advantage": advantages[-1] if member else 0.0, "w_grpo": float(member)}
            more |= {"group_size": len(rewards) if member else 1, "w_sft": float(grade in routing.sft)}
            rows.append(shard_row("sft", prompt_id, 0, prompt, tokens_of(rng, 2, 12), **more))
    return pa.Table.from_pylist(rows, ARROW["shards"])


def units_of(table: pa.Table, method: Method) -> list[Unit]:
    teacher = make_ref(table, seed=8, role="teacher") if "teacher" in method.loss.logprob_roles else None
    shards = Shards(table, teacher=teacher, mask_truncated=method.loss.grpo.mask_truncated)
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in table.to_pylist():
        found.setdefault((row["prompt_id"], row["route"]), []).append((row["route"], row["item_id"]))
    return [shards.rows(keys) for keys in found.values()]


def prompts_in(table: pa.Table) -> int:
    return len(table["prompt_id"].unique())


# ---------------------------------------------------------------- the formulas, in loops
def written_out(name: str, table: pa.Table, model: torch.nn.Module) -> torch.Tensor:
    rows = table.to_pylist()
    rl, traces = ([r for r in rows if r["route"] == route] for route in ("rl", "sft"))
    looked = {r["item_id"]: by_hand.forward_alone(model, r) for r in rows}
    logps = {item: lp for item, (lp, _) in looked.items()}
    entropy = {item: float(e.detach().mean()) for item, (_, e) in looked.items()}
    groups, n = len({r["prompt_id"] for r in rl}), prompts_in(table)

    def ratio(r: dict) -> torch.Tensor:
        return (logps[r["item_id"]] - torch.tensor(r["old_logprobs"], dtype=torch.float64)).exp()

    def clipped(r: dict, low: float, high: float) -> torch.Tensor:
        a = r["advantage"]
        return -torch.minimum(ratio(r) * a, ratio(r).clamp(1 - low, 1 + high) * a)

    def mean_over_tokens(found: list[tuple[dict, torch.Tensor]], rows_counted: list[dict]) -> torch.Tensor:
        return sum(t.sum() for _, t in found) / sum(len(r["tokens"]) for r in rows_counted)

    def sft_by_token(weight=lambda r: 1.0) -> torch.Tensor:
        return mean_over_tokens([(r, -weight(r) * logps[r["item_id"]]) for r in traces], traces)

    def by_row(term) -> torch.Tensor:
        return sum(term(r).mean() for r in rl) / (groups * K)

    if name == "sft":
        return sft_by_token()
    if name in ("grpo", "prism"):
        return by_row(lambda r: clipped(r, 0.2, 0.2))
    if name == "dr_grpo":
        return sum(clipped(r, 0.2, 0.2).sum() for r in rl) / (groups * K * 50)
    if name == "dapo":
        return mean_over_tokens([(r, clipped(r, 0.2, 0.28)) for r in rl if r["finish_reason"] != "length"], rl)
    if name == "gspo":

        def sequence(r: dict) -> torch.Tensor:
            s, a = ratio(r).log().mean().exp(), r["advantage"]
            return -torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)

        return by_row(sequence)
    if name == "cispo":
        return mean_over_tokens(
            [(r, -ratio(r).detach().clamp(max=5) * r["advantage"] * logps[r["item_id"]]) for r in rl], rl
        )
    if name == "uniform_mix":
        return sum((-ratio(r) * r["advantage"]).sum() for r in rl) / (groups * K * 50) + 0.7 * sft_by_token()
    if name == "superrl":
        return (groups / n) * by_row(lambda r: clipped(r, 0.2, 0.2)) + (len(traces) / n) * sft_by_token()
    if name == "hpt":
        pg = sum((-ratio(r) * r["advantage"]).sum() for r in rl) / (groups * K * 50)
        return (groups / n) * pg + (len(traces) / n) * 0.3 * sft_by_token()
    if name == "luffy":
        total = torch.zeros((), dtype=torch.float64)
        for prompt in {r["prompt_id"] for r in rl}:
            mine = [r for r in rl if r["prompt_id"] == prompt]
            demos = [r for r in traces if r["prompt_id"] == prompt]
            summed = sum((-ratio(r) * r["advantage"]).sum() for r in mine)
            for r in demos:
                p = logps[r["item_id"]].exp()
                summed = summed - (p / (p + 0.1) * r["advantage"]).sum()
            total = total + summed / (len(mine) + len(demos)) / 50
        return total / groups
    if name == "srft":
        demo = sum((-0.5 * math.exp(-entropy[r["item_id"]]) * logps[r["item_id"]]).mean() for r in traces) / len(traces)
        total = torch.zeros((), dtype=torch.float64)
        for r in [*rl, *traces]:
            lp = logps[r["item_id"]]
            if r["route"] == "sft":
                term = -lp.exp() * r["advantage"]
            else:
                term = -0.1 * math.exp(entropy[r["item_id"]]) * lp if r["correct"] else lp
            members = sum(o["prompt_id"] == r["prompt_id"] for o in rows)
            total = total + term.mean() / members
        return demo + total / groups
    if name == "chord":
        return 0.4 * mean_over_tokens([(r, clipped(r, 0.2, 0.2)) for r in rl], rl) + 0.6 * sft_by_token()
    if name == "chord_phi":

        def phi(r: dict) -> torch.Tensor:
            p = logps[r["item_id"]].exp().detach()
            return p * (1 - p)

        return 0.9 * mean_over_tokens([(r, clipped(r, 0.2, 0.2)) for r in rl], rl) + 0.1 * sft_by_token(phi)
    if name == "bridge":  # its step has two more gradients: test_bridge.py
        return 0.3 * by_row(lambda r: clipped(r, 0.2, 0.2)) + 0.7 * sft_by_token()
    if name == "opd":
        stored = by_hand.reference(make_ref(table, seed=8, role="teacher"))

        def distilled(r: dict) -> torch.Tensor:
            a = torch.tensor(stored[r["item_id"]], dtype=torch.float64) - torch.tensor(
                r["old_logprobs"], dtype=torch.float64
            )
            return -torch.minimum(ratio(r) * a, ratio(r).clamp(0.8, 1.2) * a)

        return mean_over_tokens([(r, distilled(r)) for r in rl], rl)
    assert name == "grpo_flat"
    flat = torch.zeros((), dtype=torch.float64)
    for prompt in {r["prompt_id"] for r in rl}:
        means = {
            c: [logps[r["item_id"]].mean() for r in rl if (r["prompt_id"], r["correct"]) == (prompt, c)]
            for c in (True, False)
        }
        flat = flat - 0.4 * (sum(means[True]) / len(means[True]) - sum(means[False]) / len(means[False]))
    mid = 0.3 * by_row(lambda r: clipped(r, 0.2, 0.2)) + 0.7 * flat / groups
    return (groups / n) * mid + (len(traces) / n) * sft_by_token()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_s_loss_and_gradient_are_its_formula_written_out_row_by_row(name: str) -> None:
    table, method = table_of(name), method_of(name)
    units, model = units_of(table, method), policy_lm()
    seen = accumulate_as(model, units, count(units, prompts_in(table)), method, micro_batch_tokens=60)
    plain = exact_llama()
    loss = written_out(name, table, plain)
    loss.backward()
    assert seen.total == pytest.approx(loss.item(), rel=1e-9)
    got, expected = gradient(model), gradient(plain)
    assert expected.norm() > 1e-4
    assert (got - expected).norm() <= 1e-9 * expected.norm()


@given(budget=st.integers(1, 300), order=st.randoms(use_true_random=False), name=st.sampled_from(sorted(NAMES)))
@settings(deadline=None, max_examples=12)
def test_no_method_s_gradient_sees_the_split_or_the_order(budget: int, order: object, name: str) -> None:
    table, method = table_of(name), method_of(name)
    units = units_of(table, method)
    counts = count(units, prompts_in(table))
    whole, split = policy_lm(), policy_lm()
    accumulate_as(whole, units, counts, method, micro_batch_tokens=10_000)
    order.shuffle(units)  # type: ignore[attr-defined]
    accumulate_as(split, units, counts, method, micro_batch_tokens=budget)
    assert (gradient(split) - gradient(whole)).norm() <= 1e-9 * gradient(whole).norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_lacks_one_kind_of_row_gives_numbers_not_nan(name: str) -> None:
    table, method = table_of(name), method_of(name)
    for route in ("rl", "sft"):
        units = [u for u in units_of(table, method) if u[0].route == route]
        if not units or method.routing(0).union:
            continue  # a member of a group comes with its group
        model = policy_lm()
        seen = accumulate_as(model, units, count(units, len(units)), method, micro_batch_tokens=60)
        assert math.isfinite(seen.total)
        assert bool(gradient(model).isfinite().all())


def test_a_group_that_need_not_run_has_no_gradient_when_it_is_run() -> None:
    """What `silent` leaves out is exactly zero: the same update with those groups alone."""
    for name in NAMES:
        table, method = table_of(name), method_of(name)
        quiet = [u for u in units_of(table, method) if silent(u, method.loss)]
        if not quiet:
            assert name in ("sft", "dapo", "superrl", "srft", "opd", "grpo_flat") or method.routing(0).rl == ()
            continue
        for unit in quiet:
            assert all(row.advantage == 0 for row in unit)
            assert len({row.rating for row in unit}) == 1
        model = policy_lm()
        seen = accumulate_as(model, quiet, count(quiet, len(quiet)), method, micro_batch_tokens=60)
        assert (seen.grpo, float(gradient(model).norm())) == (0.0, 0.0)
        groups = [u for u in quiet if u[0].route == "rl"]
        assert len(seen.rl_rows) == len(groups[0])  # one runs all the same: the behaviour check needs its rows
        assert len(seen.silent_rows) == sum(map(len, groups[1:]))


# ---------------------------------------------------------------- the pieces (ALGORITHMS section 8, tests 6, 10, 11, 12)
@given(p=st.floats(1e-6, 1.0), gamma=st.sampled_from([0.01, 0.1, 0.5]))
@settings(deadline=None)
def test_luffy_s_shaping_has_its_derivative_and_its_peak_of_a_quarter_at_p_equals_gamma(p: float, gamma: float) -> None:
    logp = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    loss = off_policy_surrogate(logp, torch.ones(1, dtype=torch.float64), shaping=gamma)
    assert -loss.item() == pytest.approx(p / (p + gamma), rel=1e-9)
    loss.backward()
    assert -logp.grad.item() == pytest.approx(gamma * p / (p + gamma) ** 2, rel=1e-9)
    peak = torch.tensor([math.log(gamma)], dtype=torch.float64, requires_grad=True)
    off_policy_surrogate(peak, torch.ones(1), shaping=gamma).backward()
    assert -peak.grad.item() == pytest.approx(0.25, rel=1e-9)
    assert -logp.grad.item() <= 0.25 + 1e-12


def test_a_trace_is_never_clipped_however_far_the_policy_is_from_it() -> None:
    logps = torch.tensor([-30.0, -5.0, -0.01], dtype=torch.float64, requires_grad=True)
    off_policy_surrogate(logps, torch.tensor([1.0]), shaping=None).sum().backward()
    assert (logps.grad < 0).all()
    with pytest.raises(ValueError, match="above 0"):
        off_policy_surrogate(logps, torch.ones(1), shaping=0.0)


def test_chord_s_phi_is_detached_and_peaks_at_one_half() -> None:
    logps = torch.tensor([0.5, 0.25, 0.75, 1.0], dtype=torch.float64).log().requires_grad_()
    weights = phi_weights(logps)
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([0.25, 0.1875, 0.1875, 0.0])


def test_srft_s_weights_are_of_a_row_s_mean_entropy_and_detached() -> None:
    entropy = torch.tensor([[1.0, 3.0, 9.0], [0.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    down, up = (entropy_weights(entropy, mask, scale=0.5, sign=sign) for sign in (-1, 1))
    assert down.flatten().tolist() == pytest.approx([0.5 * math.exp(-2), 0.5])
    assert up.flatten().tolist() == pytest.approx([0.5 * math.exp(2), 0.5])
    assert not down.requires_grad


@given(successes=st.integers(1, K - 1), seed=st.integers(0, 100))
@settings(deadline=None)
def test_the_flat_term_is_gal_s_gradient_where_the_reference_is_the_policy_itself(successes: int, seed: int) -> None:
    """ALGORITHMS section 1: with d = 0, GAL is beta / 2 times the difference of means."""
    start = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rewards = torch.tensor([i < successes for i in range(K)])
    flat, gal = start.clone().requires_grad_(), start.clone().requires_grad_()
    flat_alignment(flat, rewards, beta=0.8).backward()
    group_alignment(gal, start, rewards, beta=0.8).backward()
    torch.testing.assert_close(flat.grad, gal.grad, rtol=1e-12, atol=1e-15)
    expected = [-0.4 / successes if right else 0.4 / (K - successes) for right in rewards.tolist()]
    assert flat.grad.tolist() == pytest.approx(expected)
    assert flat_alignment(start, torch.ones(K), beta=1.0).item() == 0


def test_chord_s_mu_falls_from_its_peak_to_its_valley_and_stays() -> None:
    method = TypeAdapter(AnyMethod).validate_python({"type": "chord", "warmup_steps": 4, "decay_steps": 10})
    mus = [method.weights(step).sft for step in range(20)]
    assert mus[0] == pytest.approx(0.05)
    assert mus[4] == max(mus) == pytest.approx(0.9)
    assert mus[9] == pytest.approx(0.475)
    assert mus[14:] == pytest.approx([0.05] * 6)
    assert all(method.weights(s).sft + method.weights(s).grpo == pytest.approx(1) for s in range(20))


def test_an_sft_stage_has_its_own_optimizer_rate_and_decay_and_rl_begins_anew() -> None:
    from schemas.recipe import Train
    from trainer.optim import update_rate
    from trainer.schedule import plan_round

    train = Train.model_validate(
        {"steps": 10, "prompts_per_step": 2, "method": {"type": "sft_then_rl", "sft_rounds": 2, "lr": 1e-6, "sft_lr": 1e-3}}
    )

    def rates(round: int) -> list[float]:
        (name,) = {u.optimizer for s in plan_round(make_shards(), train, seed=0, round=round) for u in s.updates}
        assert name == ("sft" if round < 2 else "main")
        return [update_rate(train, name, round=round, index=i, rounds=4, taken=round * 10 + i) for i in range(10)]

    sft = rates(0) + rates(1)
    assert sft[:2] == pytest.approx([0.5e-3, 1e-3])  # a tenth of 20 steps
    assert sft[-1] == pytest.approx(1e-4)
    assert all(a >= b for a, b in itertools.pairwise(sft[1:]))
    assert rates(2) + rates(3) == [1e-6] * 20


def test_prism_s_stages_each_have_their_own_warm_up_and_only_sft_an_optimizer_of_its_own() -> None:
    from schemas.recipe import Train
    from trainer.optim import update_rate
    from trainer.schedule import plan_round

    method = {"type": "prism", "sft_rounds": 1, "align_rounds": 2, "lr": 1e-6, "sft_lr": 1e-3}
    optimizer = {"warmup_steps": 2, "decay": "linear"}
    train = Train.model_validate({"steps": 10, "prompts_per_step": 2, "method": method, "optimizer": optimizer})

    def rates(round: int) -> list[float]:
        (name,) = {u.optimizer for s in plan_round(make_shards(), train, seed=0, round=round) for u in s.updates}
        assert name == ("sft" if round == 0 else "main")
        return [update_rate(train, name, round=round, index=i, rounds=5, taken=round * 10 + i) for i in range(10)]

    aligned, rewarded = rates(1) + rates(2), rates(3) + rates(4)
    assert rates(0)[0] == pytest.approx(1e-3)
    assert aligned == rewarded
    assert aligned[:3] == pytest.approx([0.5e-6, 1e-6, 1e-6])
    assert aligned[-1] == pytest.approx(1e-7)


@pytest.mark.parametrize("name", ["grpo", "uniform_mix", "chord"])
def test_the_components_weigh_by_their_share_of_the_step_or_by_their_own_rows(name: str) -> None:
    table, method = table_of(name), method_of(name)
    units = units_of(table, method)
    counts = count(units, 12)  # six of the step's prompts had nothing
    mix = mixture(method.weights(0), method.loss, counts)
    assert mix.grpo == pytest.approx(method.weights(0).grpo * (1 if method.loss.normalise == "own" else counts.mid / 12))


def test_what_a_user_chooses_takes_away_the_published_keys_that_belong_to_the_other_choice() -> None:
    validate = TypeAdapter(AnyMethod).validate_python
    hpt = validate({"type": "hpt", "grpo": {"aggregation": "token-mean"}})
    assert (hpt.grpo.aggregation, hpt.grpo.horizon, hpt.grpo.advantage) == ("token-mean", None, "none")
    cispo = validate({"type": "cispo", "grpo": {"surrogate": "clip"}})
    assert (cispo.grpo.clip_low, cispo.grpo.clip_high) == (0.2, 0.2)
    assert validate({"type": "dr_grpo", "grpo": {"horizon": 99}}).grpo.horizon == 99


def test_sft_s_rate_is_the_published_cosine_with_a_warm_up_over_all_rounds() -> None:
    from schemas.recipe import Train
    from trainer.optim import update_rate

    train = Train.model_validate({"steps": 10, "prompts_per_step": 2, "method": {"type": "sft"}})
    rates = [update_rate(train, "main", round=r, index=i, rounds=2, taken=10 * r + i) for r in range(2) for i in range(10)]
    assert rates[:2] == pytest.approx([2.5e-5, 5e-5])
    assert rates[-1] == pytest.approx(5e-6)
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))


def test_relift_s_buffer_is_emptied_at_the_round_s_end() -> None:
    from schemas.recipe import Train
    from trainer.schedule import plan_round

    method = {"type": "relift", "sft_rows": 128}
    train = Train.model_validate({"steps": 5, "prompts_per_step": 4, "method": method})
    steps = plan_round(make_shards(hard=10, mid=10), train, seed=0, round=0)
    made = [(s.index, u.optimizer, len(u.visits)) for s in steps for u in s.updates]
    assert [m for m in made if m[1] == "sft"] == [(4, "sft", steps[-1].cursor.hard_trained)]
    assert steps[-1].cursor.hard_trained > 0
    assert steps[-1].cursor.hard_waiting == 0
