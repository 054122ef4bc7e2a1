"""Gradient variance of the loss's components at one checkpoint, from stored rows. docs/probe.md says what is estimated.

The unit is one gated prompt, as an update of its own: a Mid prompt's group gives GRPO and GAL (and so their mix), a Hard
prompt's drawn trace SFT. Beside that, each Mid group is cut into random halves that are both mixed: the two halves'
gradients differ by sampling noise alone. One idea: a prompt's forward is made once, and every gradient (component, half)
is one backward through it into a linear sketch, so memory is prompts x sketch width, whatever the model's size.
Left out: the estimators (variance.py), the sketch (sketch.py), files and printing (pipeline/probe.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.methods import Loss, Method
from schemas.recipe import Policy, Train
from trainer.batch import pack
from trainer.forward import reference_logprobs
from trainer.losses import grpo_advantages
from trainer.model import PolicyLM, load_model
from trainer.objective import Counts, Unit, components, count, micro_batch, mixture
from trainer.rows import Row, Shards
from trainer.schedule import Visit, first_epoch
from trainer.sketch import Sketch
from trainer.variance import (
    Array,
    Moments,
    Pair,
    correlation,
    cross_product,
    direction_variance,
    eq19,
    interval,
    moments,
    noise_to_signal,
    resample_weights,
    split_moments,
    with_mix,
)

MIN_PROMPTS = 10  # below, a bootstrap interval over prompts says too little (docs/probe.md has its coverage)
SPLITS = 4  # random halvings of a group
Part = tuple[Sequence[int], Unit]  # some rows of a unit (their places, and the rows), as a group of their own


@dataclass(frozen=True)
class VarianceJob:
    """What to measure. folder: HF folder of the checkpoint. base: the run's base policy, whose log-probs are computed
    where the method reads a reference and `ref` (rows of ARROW["logprobs"]) is None. shards: the round's, both routes.
    prompts: at most so many of each route. sketch: the sketch's width. tell(done, total): prompts, for progress."""

    round: int
    seed: int
    train: Train
    policy: Policy
    folder: Path
    base: Path
    shards: pa.Table
    ref: pa.Table | None
    prompts: int
    sketch: int
    tell: Callable[[int, int], None] = lambda done, total: None


@dataclass
class Halves:
    """Noise and signal within each Mid prompt whose group has mixed halves, and the chance of such a split. Lists over prompts."""

    noise: dict[Pair, list[float]] = field(default_factory=dict)
    signal: dict[Pair, list[float]] = field(default_factory=dict)
    chance: list[float] = field(default_factory=list)
    sizes: set[int] = field(default_factory=set)


def probe_variance(job: VarianceJob) -> dict[str, Any]:
    """The measured quantities as JSON values; an interval is {value, ci_low, ci_high}, null where there is none.

    Raises UserError before the model is loaded if neither route has MIN_PROMPTS prompts, or the run's gradient is none that
    is measured here (grpo.old = trainer, LoRA).
    """
    loss = job.train.method.loss
    if loss.grpo.old == "trainer" or job.train.lora is not None:
        raise UserError(
            "probe variance: not with grpo.old = 'trainer' or train.lora, whose gradient is another one than it would measure; "
            "set grpo.old = 'sampler', or probe a run that trains all weights"
        )
    if loss.off_policy != "none" or loss.rollout_term != "surrogate":
        raise UserError(
            f"probe variance: not with method {job.train.method.type}, whose groups have a trace as a member or whose advantages are not "
            "the group's; probe a run of another method on the same rows"
        )
    visits, gated = _chosen(job)
    method = job.train.method
    names = {"sft": ["sft"], "rl": ["grpo", "gal"] if loss.gal is not None else ["grpo"]}
    shards = _rows(job, visits)
    model = load_model(job.folder, job.policy)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sketch = Sketch(parameters, job.sketch, seed=job.seed)

    sketches: dict[str, list[Array]] = {name: [] for route in names.values() for name in route}
    halves = Halves()
    left_one_out = "leave_one_out" in method.adjust  # a half of such a group is not like it: no sampling noise of it
    for done, visit in enumerate(visits):
        unit = shards.rows(visit.items)
        splits = _splits(unit, job) if visit.route == "rl" and not left_one_out else []
        parts: list[Part] = [(range(len(unit)), unit)]
        parts += [_half(unit, at, loss) for pair in splits for at in pair]
        gradients = part_gradients(model, unit, parts, names[visit.route], loss)
        found: list[dict[str, Array]] = [{} for _ in parts]
        for part, name, gradient in gradients:
            found[part][name] = _finite(sketch(gradient), visit)
        for name, of_name in found[0].items():
            sketches[name].append(of_name)
        if splits:
            _add_halves(halves, found[1:], [row.correct for row in unit])
        job.tell(done + 1, len(visits))
    return {
        "min_prompts": MIN_PROMPTS,
        "left_one_out": left_one_out,
        "parameters": parameters,
        "sketch": None if sketch.exact else sketch.width,
        "gated": {route: gated[route] for route in ("rl", "sft")},
        "prompts": {route: sum(v.route == route for v in visits) for route in ("rl", "sft")},
        **_results(
            {name: np.array(rows) for name, rows in sketches.items() if rows}, halves, method, job.seed, _shared(visits)
        ),
    }


# ---------------------------------------------------------------- rows
def _chosen(job: VarianceJob) -> tuple[list[Visit], dict[str, int]]:
    """The first `prompts` visits of each route in the order of the round's first epoch, with its draws of traces.

    A route with fewer than MIN_PROMPTS is left out. Also how many prompts each route has.
    """
    visits = first_epoch(job.shards, seed=job.seed, round=job.round)
    routes = {route: [v for v in visits if v.route == route] for route in ("rl", "sft")}
    gated = {route: len(of) for route, of in routes.items()}
    chosen = [v for of in routes.values() if min(len(of), job.prompts) >= MIN_PROMPTS for v in of[: job.prompts]]
    if not chosen:
        raise UserError(
            f"probe variance: round {job.round} has {gated['rl']} Mid prompts (GRPO, GAL, mix) and {gated['sft']} Hard ones "
            f"(SFT), at most {job.prompts} of each to be used; an estimate needs at least {MIN_PROMPTS} of a route. "
            "Raise --prompts, take another --round, or grade more prompts (rollouts.prompts_per_round)"
        )
    return chosen, gated


def _rows(job: VarianceJob, visits: Sequence[Visit]) -> Shards:
    """The visits' rows, with reference log-probs if the method reads them."""
    shards = job.shards.filter(pc.field("prompt_id").isin(sorted({v.prompt_id for v in visits})))
    ref = job.ref
    if not job.train.method.loss.needs_reference:
        ref = None
    elif ref is None:
        tables = list(reference_logprobs(job.base, shards, job.policy, job.train.micro_batch_tokens))
        ref = pa.concat_tables(tables) if tables else None
    loss = job.train.method.loss
    pairs = loss.gal.pairs if loss.gal is not None else "correct"
    return Shards(shards, ref, mask_truncated=loss.grpo.mask_truncated, pairs=pairs)


# ---------------------------------------------------------------- gradients
def part_gradients(
    model: PolicyLM, unit: Unit, parts: Sequence[Part], names: Sequence[str], loss: Loss
) -> Iterator[tuple[int, str, list[Tensor]]]:
    """(part, component, gradient that the part contributes as an update of its own: a tensor a parameter), one at a time.

    One forward, of the whole unit; then one backward for each part and component.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = str(model.device)
    logps_BT, entropy_BT = model(pack(unit, model.device, share=model.packed))
    for number, (at, rows) in enumerate(parts):
        batch = micro_batch([rows], count([rows], 1), loss, device)
        columns = batch.old_BT.shape[1]
        leaf_BT = logps_BT.detach()[list(at), :columns].requires_grad_()
        values = components(leaf_BT, entropy_BT[list(at), :columns], batch, loss)
        for name in names:
            (grad_BT,) = torch.autograd.grad(getattr(values, name), leaf_BT, retain_graph=True)
            seed_BT = torch.zeros_like(logps_BT)
            seed_BT[list(at), :columns] = grad_BT
            grads = torch.autograd.grad(logps_BT, parameters, seed_BT, retain_graph=True, allow_unused=True)
            yield number, name, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _finite(sketch_D: Tensor, visit: Visit) -> Array:
    if not bool(sketch_D.isfinite().all()):
        items = ", ".join(item for _, item in visit.items[:8])
        raise WorkError(
            f"probe variance: the gradient of prompt {visit.prompt_id} is not finite, where the loss is finite for every "
            f"sound row. Items: {items}. Look at them with `dypo sql`, or probe another checkpoint (--round, --step)"
        )
    return sketch_D.cpu().numpy()


# ---------------------------------------------------------------- halves
def split_chance(k: int, successes: int) -> float:
    """The chance that a random half of a group of k (even) with so many right ones leaves both halves mixed."""
    half = k // 2
    good = range(max(1, successes - half + 1), min(half - 1, successes - 1) + 1)
    return sum(math.comb(successes, a) * math.comb(k - successes, half - a) for a in good) / math.comb(k, half)


def random_splits(correct: Sequence[bool], splits: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """`splits` random halvings, uniform among those with both halves mixed; none if k is odd or there is no such one."""
    k = len(correct)
    if k % 2 or split_chance(k, sum(correct)) == 0:
        return []
    rng = np.random.default_rng(seed)
    found: list[tuple[list[int], list[int]]] = []
    while len(found) < splits:
        order = rng.permutation(k).tolist()
        first, second = sorted(order[: k // 2]), sorted(order[k // 2 :])
        if all(0 < sum(correct[i] for i in half) < k // 2 for half in (first, second)):
            found.append((first, second))
    return found


def _splits(unit: Unit, job: VarianceJob) -> list[tuple[list[int], list[int]]]:
    seed = seed_from("halves", job.seed, job.round, unit[0].prompt_id)
    return random_splits([row.correct for row in unit], SPLITS, seed)


def _shared(visits: Sequence[Visit]) -> bool:
    """Whether some prompt is visited by both routes."""
    return bool({v.prompt_id for v in visits if v.route == "rl"} & {v.prompt_id for v in visits if v.route == "sft"})


def _half(unit: Unit, at: Sequence[int], loss: Loss) -> Part:
    """Some rows of a group as a group of their own, with its own advantages."""
    rewards = torch.tensor([unit[i].reward for i in at], dtype=torch.float64)
    advantages = grpo_advantages(rewards, scale=loss.grpo.advantage, eps=loss.grpo.eps).tolist()
    rows: list[Row] = [replace(unit[i], advantage=a, group_size=len(at)) for i, a in zip(at, advantages, strict=True)]
    return at, rows


def _add_halves(halves: Halves, found: Sequence[dict[str, Array]], correct: Sequence[bool]) -> None:
    """One prompt's noise |g - g'|^2 / 2 and signal g . g', averaged over its splits. found: half, other half, half, ..."""
    halves.chance.append(split_chance(len(correct), sum(correct)))
    halves.sizes.add(len(correct) // 2)
    names = list(found[0])
    couples = list(zip(found[::2], found[1::2], strict=True))
    for a, b in [(a, b) for i, a in enumerate(names) for b in names[i:]]:
        noise = [(g[a] - h[a]) @ (g[b] - h[b]) / 2 for g, h in couples]
        signal = [(g[a] @ h[b] + h[a] @ g[b]) / 2 for g, h in couples]
        halves.noise.setdefault((a, b), []).append(float(np.mean(noise)))
        halves.signal.setdefault((a, b), []).append(float(np.mean(signal)))


# ---------------------------------------------------------------- results
def _results(sketches: dict[str, Array], halves: Halves, method: Method, seed: int, shared: bool) -> dict[str, Any]:
    """Components, pairs of them, Eq. 19, and the same within prompts."""
    mixed = mixture(
        method.weights(0), method.loss, Counts(prompts=1, hard=0, mid=1, rows=1, sft_tokens=0, rl_tokens=1, pairs=1)
    )
    both = {"grpo", "gal"} <= set(sketches)
    if both:
        sketches = sketches | {"mix": mixed.grpo * sketches["grpo"] + mixed.gal * sketches["gal"]}
    weights = {n: resample_weights(len(s), seed=seed_from("resamples", seed, n == "sft")) for n, s in sketches.items()}
    found: dict[str, Any] = {"components": {}, "pairs": [], "eq19": None, "sampling": None}
    mid = {name: rows for name, rows in sketches.items() if name != "sft"}
    of = moments(mid, weights["grpo"]) if mid else Moments({}, {})
    if "sft" in sketches:
        alone = moments({"sft": sketches["sft"]}, weights["sft"])
        apart = {} if shared else mid  # of prompts with both a group and a trace the two are no independent samples
        cross = {(n, "sft"): cross_product(s @ sketches["sft"].T, weights[n], weights["sft"]) for n, s in apart.items()}
        of = Moments({**of.noise, **alone.noise}, {**of.signal, **alone.signal, **cross})
    for name, rows in sketches.items():
        numbers = _numbers(of, name) | {"direction_variance": interval(direction_variance(rows @ rows.T, weights[name]))}
        found["components"][name] = {"prompts": len(rows)} | {k: vars(v) for k, v in numbers.items()}
    for a, b in of.signal:
        if a != b:
            noise = vars(interval(correlation(of.noise, a, b), -1, 1)) if (a, b) in of.noise else None
            cosine = vars(interval(correlation(of.signal, a, b), -1, 1))
            found["pairs"].append({"a": a, "b": b, "cosine": cosine, "noise_correlation": noise})
    if both:
        found["weights"] = {"grpo": mixed.grpo, "gal": mixed.gal}
        found["eq19"] = {k: vars(v) for k, v in eq19(of, mixed.grpo, mixed.gal).items()}
    if len(halves.chance) >= MIN_PROMPTS:
        drawn = resample_weights(len(halves.chance), seed=seed_from("halves", seed))
        noise, signal = ({pair: np.array(v) for pair, v in part.items()} for part in (halves.noise, halves.signal))
        within = split_moments(noise, signal, np.array(halves.chance), drawn)
        within = with_mix(within, mixed.grpo, mixed.gal) if both else within
        found["sampling"] = {
            "group_sizes": sorted(halves.sizes),
            "prompts": len(halves.chance),
            "splits": SPLITS,
            "components": {n: {k: vars(v) for k, v in _numbers(within, n).items()} for n in mid},
            "eq19": {k: vars(v) for k, v in eq19(within, mixed.grpo, mixed.gal).items()} if both else None,
        }
    return found


def _numbers(of: Moments, name: str) -> dict[str, Any]:
    return {
        "trace_cov": interval(of.noise[name, name]),
        "signal": interval(of.signal[name, name]),
        "noise_to_signal": interval(noise_to_signal(of, name), 0),
    }
