"""The numbers of one step, from what its updates saw. docs/metrics.md defines each; a test compares the names.

One idea: a number that is a mean over nothing is left out, never written as 0; the denominators say why.
Left out: which steps there are, and writing (journal.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.methods import GRPO, Loss, Method
from trainer.schedule import Step
from trainer.step import Observed

SATURATED = 5.0  # |d| beyond which a pair's sigmoid is flat
CLOCKED = frozenset({"tokens_per_s"})  # what a clock decides: never the same twice


def step_metrics(
    step: Step,
    seen: Mapping[str, Observed],
    method: Method,
    *,
    graded: Mapping[str, int],
    seconds: float,
) -> dict[str, float]:
    """All metrics of a step. seen: by optimizer, of the updates that were made."""
    every = list(seen.values())
    out: dict[str, float | np.floating] = {}
    out |= _denominators(every) | _routes(every, graded) | _losses(every)
    for name, observed in seen.items():
        suffix = f"_{name}" if name != "main" and method.queues is not None else ""  # two updates in a step
        out[f"grad_norm{suffix}"] = observed.grad_norm
        out[f"lr{suffix}"] = observed.rate
        out |= observed.more
    for observed in every:
        if observed.rl_rows or observed.silent_rows:
            out |= _rollouts(observed)
        if observed.rl_rows:
            out |= _policy(observed, method.loss) | _alignment(observed)
    if method.queues is not None:
        out["queue/hard_waiting"] = step.cursor.hard_waiting
        out["queue/mid_waiting"] = step.cursor.mid_waiting
        out["queue/mid_dropped"] = len(step.dropped)
    unrun = sum(len(row.tokens) for o in every for row in o.silent_rows)
    tokens = sum(o.prompt_tokens + o.counts.sft_tokens + o.counts.rl_tokens for o in every) - unrun
    out["tokens_per_s"] = tokens / max(seconds, 1e-9)
    return {name: float(value) for name, value in out.items()}


def summary(metrics: Mapping[str, float]) -> str:
    """One short line for whoever watches."""
    shown = {"loss": "loss/total", "grad": "grad_norm", "reward": "reward", "ess": "ess", "tok/s": "tokens_per_s"}
    return " ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items() if name in metrics)


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2), between 1 / n and 1, computed from log w without overflow."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum()))


def _denominators(every: Sequence[Observed]) -> dict[str, float]:
    def total(name: str) -> float:
        return sum(getattr(o.counts, name) for o in every)

    names = {"prompts": "prompts", "rows": "rows", "groups": "mid", "pairs": "pairs"}
    names |= {"sft_tokens": "sft_tokens", "rl_tokens": "rl_tokens"}
    return {f"denom/{name}": total(field) for name, field in names.items()}


def _routes(every: Sequence[Observed], graded: Mapping[str, int]) -> dict[str, float]:
    prompts = sum(graded.values())
    out = {f"route/{g}_frac": graded.get(g, 0) / prompts for g in ("easy", "mid", "hard")} if prompts else {}
    hard, mid = sum(o.counts.hard for o in every), sum(o.counts.mid for o in every)
    if hard + mid:
        sft_tokens, rl_tokens = sum(o.counts.sft_tokens for o in every), sum(o.counts.rl_tokens for o in every)
        out["offline_ratio"] = hard / (hard + mid)
        out["offline_token_ratio"] = sft_tokens / (sft_tokens + rl_tokens)
    return out


def _losses(every: Sequence[Observed]) -> dict[str, float]:
    out = {}
    if every:
        out["loss/total"] = sum(o.total for o in every)
    if any(o.mixture.sft > 0 for o in every):
        out["loss/sft"] = sum(o.sft for o in every)
    if any(o.counts.mid for o in every):
        out["loss/grpo"] = sum(o.grpo for o in every)
    if any(o.margins for o in every):
        out["loss/gal"] = sum(o.gal for o in every)
    return out


@dataclass(frozen=True)
class RowNumbers:
    """What one rl row says about the policy that is trained on it: means over its tokens (draws has them by row)."""

    log_ratio: float
    kl: float
    clip_fraction: float | None


def by_row(seen: Observed, loss: Loss) -> list[RowNumbers]:
    """The numbers of each of `seen.rl_rows`, in their order."""
    out = []
    for row, log_ratio_T in zip(seen.rl_rows, seen.log_ratios, strict=True):
        by_sequence = loss.grpo.ratio == "sequence"
        advantage = np.array(row.advantage)
        if loss.rollout_term == "distill":
            advantage = _f64(row.teacher_logps) - _f64(row.old_logps)
        clipped = _clipped(log_ratio_T.mean(keepdims=True) if by_sequence else log_ratio_T, advantage, loss.grpo)
        fraction = float(clipped.mean()) if _clips(loss) else None
        out.append(RowNumbers(float(log_ratio_T.mean()), float(_k3(log_ratio_T).mean()), fraction))
    return out


def sampler_gaps(seen: Observed) -> list[np.ndarray]:
    """By rl row, a value a token: log-prob under the policy being trained minus the sampler's own, in nats."""
    rows = zip(seen.rl_rows, seen.log_ratios, strict=True)
    return [log_ratio_T + _f64(row.old_logps) - _f64(row.sampler_logps) for row, log_ratio_T in rows]


def _clips(loss: Loss) -> bool:
    """Whether the rollouts' term has a clip at all."""
    return loss.grpo.surrogate != "unclipped" and loss.rollout_term != "self"


def _clipped(log_ratio: np.ndarray, advantage: np.ndarray, grpo: GRPO) -> np.ndarray:
    """Where clipping is in force, by the sign of the advantage. cispo: where the weight is a bound, whatever the advantage."""
    ratio = np.exp(np.clip(log_ratio, -20, 20))
    above, below = ratio > 1 + grpo.clip_high, ratio < 1 - grpo.clip_low
    if grpo.surrogate == "cispo":
        return above | below
    far = ratio > (grpo.dual_clip or np.inf)
    return (above & (advantage > 0)) | ((below | far) & (advantage < 0))


def _k3(log_ratio: np.ndarray) -> np.ndarray:
    """ratio - 1 - log ratio: the KL from whoever the log-ratio is against, on its samples."""
    safe = np.clip(log_ratio, -20, 20)
    return np.exp(safe) - 1 - safe


def _f64(logps: np.ndarray | None) -> np.ndarray:
    assert logps is not None, "an rl row has its log-probs"
    return logps.astype(np.float64)


def _rollouts(seen: Observed) -> dict[str, float | np.floating]:
    """What the update's rollouts are, those of groups that had no gradient and were not run included."""
    rows = seen.rl_rows + seen.silent_rows
    return {
        "reward": np.mean([r.reward for r in rows]),
        "age": np.mean([r.age for r in rows]),
        "completions/mean_length": np.mean([len(r.tokens) for r in rows]),
        "completions/clipped_ratio": np.mean([r.finish_reason == "length" for r in rows]),
    }


def _policy(seen: Observed, loss: Loss) -> dict[str, float | np.floating]:
    """What the rl rows say about the policy now."""
    rows, log_ratio_N, numbers = seen.rl_rows, np.concatenate(seen.log_ratios), by_row(seen, loss)
    lengths = np.array([len(r.tokens) for r in rows])
    clip_weights = None if loss.grpo.ratio == "sequence" else lengths
    out: dict[str, float | np.floating] = {
        "entropy": np.concatenate(seen.entropies).mean(),
        "ess": effective_sample_size(log_ratio_N),
        "ess_sequence": effective_sample_size(np.array([x.sum() for x in seen.log_ratios])),
        "kl": _k3(log_ratio_N).mean(),
    }
    if _clips(loss):
        fractions = [n.clip_fraction for n in numbers if n.clip_fraction is not None]
        out["clip_fraction"] = np.average(fractions, weights=clip_weights)
    if loss.needs_reference:
        gaps = [_f64(r.ref_logps) - _f64(r.old_logps) - x for r, x in zip(rows, seen.log_ratios, strict=True)]
        out["kl_ref"] = _k3(np.concatenate(gaps)).mean()
    if loss.grpo.old == "trainer":
        gaps = [_f64(r.old_logps) - _f64(r.sampler_logps) for r in rows]
        out["mismatch/abs_difference"] = np.abs(np.concatenate(gaps)).mean()
        if loss.grpo.truncation != "none":
            logs = np.array([x.sum() for x in gaps]) if loss.grpo.truncation == "sequence" else np.concatenate(gaps)
            out["mismatch/weight"] = np.exp(np.minimum(logs, np.log(loss.grpo.truncation_cap))).mean()
            out["mismatch/truncated"] = np.mean(logs > np.log(loss.grpo.truncation_cap))
    return out


def _alignment(seen: Observed) -> dict[str, float | np.floating]:
    """How far GAL's pairs are apart, and whether it says anything that GRPO does not."""
    out: dict[str, float | np.floating] = {}
    if seen.margins:
        margins, gaps = np.array(seen.margins), np.array(seen.length_gaps, dtype=np.float64)
        out["gal/abs_d"] = np.abs(margins).mean()
        out["gal/saturated"] = np.mean(np.abs(margins) > SATURATED)
        if margins.std() > 0 and gaps.std() > 0:
            out["gal/corr_d_length"] = np.corrcoef(margins, gaps)[0, 1]
    if seen.grpo_square > 0 and seen.gal_square > 0:
        out["gal/cos_grpo"] = seen.grpo_dot_gal / np.sqrt(seen.grpo_square * seen.gal_square)
    return out
