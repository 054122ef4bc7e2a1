"""The objective and the metrics written out row by row, from the tables themselves: no Row, no batch, no padding.

Rows are dicts of `to_pylist()`. One row is one forward with full logits, a mean is a loop, and nothing here is taken from
trainer/ but the recipe's numbers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from schemas.recipe import DypoMethod

Logps = Mapping[str, Tensor]


def reference(ref: pa.Table) -> dict[str, list[float]]:
    return {row["item_id"]: row["logprobs"] for row in ref.to_pylist()}


def forward_alone(model: nn.Module, row: dict) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the response tokens; float64 from the logits on."""
    logits = model(input_ids=torch.tensor([[*row["prompt_tokens"], *row["tokens"]]])).logits[0].double()
    logps_LV = torch.log_softmax(logits / (row["temperature"] if row["route"] == "rl" else 1.0), -1)
    at = len(row["prompt_tokens"]) - 1
    logps_TV = logps_LV[at : at + len(row["tokens"])]
    return torch.stack([logps_TV[t, token] for t, token in enumerate(row["tokens"])]), -(logps_TV.exp() * logps_TV).sum(-1)


def forward_each(model: nn.Module, rows: Sequence[dict]) -> dict[str, Tensor]:
    return {row["item_id"]: forward_alone(model, row)[0] for row in rows}


def groups_of(rows: Sequence[dict]) -> list[list[dict]]:
    mid = [row for row in rows if row["route"] == "rl"]
    return [[r for r in mid if r["prompt_id"] == p] for p in dict.fromkeys(row["prompt_id"] for row in mid)]


def is_masked(row: dict, method: DypoMethod) -> bool:
    return method.grpo.mask_truncated and row["finish_reason"] == "length"


def pairs_of(group: Sequence[dict], method: DypoMethod) -> list[tuple[dict, dict]]:
    left = [row for row in group if not is_masked(row, method)]
    if method.gal.pairs == "reward":
        return [(s, f) for s in left for f in left if s["reward"] > f["reward"]]
    return [(s, f) for s in left for f in left if s["correct"] and not f["correct"]]


def with_old(rows: Sequence[dict], old: pa.Table | None) -> list[dict]:
    """The rows with the trainer's own log-probs under the policy that sampled, as `trainer_logprobs`."""
    stored = {} if old is None else reference(old)
    return [row | {"trainer_logprobs": stored.get(row["item_id"])} for row in rows]


def old_of(row: dict, method: DypoMethod) -> Tensor:
    return torch.tensor(row["trainer_logprobs" if method.grpo.old == "trainer" else "old_logprobs"], dtype=torch.float64)


def margin(s: dict, f: dict, logps: Logps, ref: Mapping[str, list[float]], method: DypoMethod) -> Tensor:
    def summary(row: dict) -> Tensor:
        gain = logps[row["item_id"]]
        if method.gal.ref == "init":
            gain = gain - torch.tensor(ref[row["item_id"]], dtype=torch.float64)
        elif method.gal.ref == "old":
            gain = gain - old_of(row, method)
        return gain.mean() if method.gal.logp_reduction == "mean" else gain.sum()

    return method.gal.beta * (summary(s) - summary(f))


def log_ratio(row: dict, logps: Logps, method: DypoMethod) -> Tensor:
    return logps[row["item_id"]] - old_of(row, method)


def mismatch(row: dict, method: DypoMethod) -> list[float]:
    """Log-weights of truncation before the cap, one a token."""
    gaps = [t - s for t, s in zip(row["trainer_logprobs"], row["old_logprobs"], strict=True)]
    return [sum(gaps)] * len(gaps) if method.grpo.truncation == "sequence" else gaps


def grpo_terms(row: dict, logps: Logps, ref: Mapping[str, list[float]], method: DypoMethod) -> list[Tensor]:
    """The loss of each token of a Mid row, before any mean."""
    g, advantage, terms = method.grpo, row["advantage"], []
    logs = log_ratio(row, logps, method)
    for t, logp in enumerate(logps[row["item_id"]]):
        ratio = logs.mean().exp() if g.ratio == "sequence" else logs[t].exp()
        clipped = ratio.clamp(1 - g.clip_low, 1 + g.clip_high)
        if g.surrogate == "cispo":
            term = -clipped.item() * advantage * logp
        else:
            term = -torch.minimum(ratio * advantage, clipped * advantage)
            if g.dual_clip is not None and advantage < 0 and ratio > g.dual_clip:
                term = 0 * logp - g.dual_clip * advantage
        if g.truncation != "none":
            term = term * min(np.exp(mismatch(row, method)[t]), g.truncation_cap)
        if g.kl > 0:
            gap = ref[row["item_id"]][t] - logp
            term = term + g.kl * (gap.exp() - gap - 1)
        terms.append(term)
    return terms


def losses(logps: Logps, rows: Sequence[dict], ref: Mapping[str, list[float]], method: DypoMethod) -> dict[str, Tensor]:
    """The three means: sft, grpo, gal."""
    hard = [row for row in rows if row["route"] == "sft"]
    groups = groups_of(rows)
    zero = torch.zeros((), dtype=torch.float64)
    if method.sft_reduction == "token":
        sft = sum((-logps[r["item_id"]].sum() for r in hard), zero) / max(1, sum(len(r["tokens"]) for r in hard))
    else:
        sft = sum((-logps[r["item_id"]].mean() for r in hard), zero) / max(1, len(hard))
    grpo, gal = zero, zero
    for group in groups:
        for row in group:
            if is_masked(row, method):
                continue
            row_sum = sum(grpo_terms(row, logps, ref, method), zero)
            if method.grpo.aggregation == "token-mean":
                grpo = grpo + row_sum / sum(len(r["tokens"]) for g in groups for r in g)
            else:
                horizon = len(row["tokens"]) if method.grpo.horizon is None else method.grpo.horizon
                grpo = grpo + row_sum / horizon / len(group) / len(groups)
        for s, f in pairs_of(group, method):
            d = margin(s, f, logps, ref, method)
            gal = gal + torch.log1p(torch.exp(-d)) / len(pairs_of(group, method)) / len(groups)
    return {"sft": sft, "grpo": grpo, "gal": gal}


def total(parts: Mapping[str, Tensor], rows: Sequence[dict], method: DypoMethod, n: int) -> Tensor:
    """DYPO Eq. 4 for `n` prompts."""
    n_hard, n_mid = sum(row["route"] == "sft" for row in rows), len(groups_of(rows))
    grpo_weight, gal_weight = (method.alpha, 1 - method.alpha) if method.gal_weight is None else (1.0, method.gal_weight)
    mid = grpo_weight * parts["grpo"] + gal_weight * parts["gal"]
    return n_hard / n * method.gamma * parts["sft"] + n_mid / n * mid


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient_of(
    model: nn.Module, rows: Sequence[dict], ref: Mapping[str, list[float]], method: DypoMethod, n: int
) -> Tensor:
    """All of the gradient as one vector, left in the `.grad`s too."""
    model.zero_grad()
    total(losses(forward_each(model, rows), rows, ref, method), rows, method, n).backward()
    return gradient(model)


def effective(log_weights: Sequence[float]) -> float:
    weights = np.exp(np.array(log_weights))
    return weights.sum() ** 2 / len(weights) / (weights**2).sum()


def k3(log_ratio: float) -> float:
    return np.exp(log_ratio) - 1 - log_ratio


def is_clipped(row: dict, logps: Logps, method: DypoMethod) -> list[bool]:
    """Token by token (sequence ratio: once), whether the clip is in force."""
    g, logs, out = method.grpo, log_ratio(row, logps, method), []
    for r in [logs.mean().exp().item()] if g.ratio == "sequence" else logs.exp().tolist():
        high, low = r > 1 + g.clip_high, r < 1 - g.clip_low
        if g.surrogate == "cispo":
            out.append(high or low)
        elif row["advantage"] > 0:
            out.append(high)
        else:
            out.append(row["advantage"] < 0 and (low or (g.dual_clip is not None and r > g.dual_clip)))
    return out


def row_numbers(row: dict, logps: Logps, method: DypoMethod) -> dict[str, float]:
    """What draws says of an rl row."""
    logs = log_ratio(row, logps, method).tolist()
    return {
        "log_ratio": np.mean(logs),
        "kl": np.mean([k3(x) for x in logs]),
        "clip_fraction": np.mean(is_clipped(row, logps, method)),
    }


def metrics(model: nn.Module, rows: Sequence[dict], ref: Mapping[str, list[float]], method: DypoMethod) -> dict[str, float]:
    """What docs/metrics.md says of a step with Hard and Mid rows, but for what is not in them: n, routes, rates, queues."""
    hard, mid, groups = [r for r in rows if r["route"] == "sft"], [r for r in rows if r["route"] == "rl"], groups_of(rows)
    with torch.no_grad():
        seen = {row["item_id"]: forward_alone(model, row) for row in rows}
    logps = {item: logps_T.requires_grad_() for item, (logps_T, _) in seen.items()}
    parts = losses(logps, rows, ref, method)
    out = {f"loss/{name}": value.item() for name, value in parts.items()}

    token_ratios = [x for row in mid for x in log_ratio(row, logps, method).tolist()]
    clipped = [x for row in mid for x in is_clipped(row, logps, method)]
    out |= {
        "entropy": np.mean([x for row in mid for x in seen[row["item_id"]][1].tolist()]),
        "clip_fraction": np.mean(clipped),
        "ess": effective(token_ratios),
        "ess_sequence": effective([log_ratio(row, logps, method).sum().item() for row in mid]),
        "kl": np.mean([k3(x) for x in token_ratios]),
        "reward": np.mean([row["reward"] for row in mid]),
        "age": np.mean([row["round"] - row["source_round"] for row in mid]),
        "completions/mean_length": np.mean([len(row["tokens"]) for row in mid]),
        "completions/clipped_ratio": np.mean([row["finish_reason"] == "length" for row in mid]),
    }

    if method.loss.needs_reference:
        gaps = [torch.tensor(ref[row["item_id"]], dtype=torch.float64) - logps[row["item_id"]] for row in mid]
        out["kl_ref"] = np.mean([k3(x) for gap in gaps for x in gap.tolist()])
    if method.grpo.old == "trainer":
        pairs_of_logps = [p for row in mid for p in zip(row["trainer_logprobs"], row["old_logprobs"], strict=True)]
        out["mismatch/abs_difference"] = np.mean([abs(t - s) for t, s in pairs_of_logps])
    if method.grpo.truncation != "none":
        by_row = method.grpo.truncation == "sequence"
        logs = [x for row in mid for x in (mismatch(row, method)[:1] if by_row else mismatch(row, method))]
        out["mismatch/weight"] = np.mean([min(np.exp(x), method.grpo.truncation_cap) for x in logs])
        out["mismatch/truncated"] = np.mean([np.exp(x) > method.grpo.truncation_cap for x in logs])

    pairs = [pair for group in groups for pair in pairs_of(group, method)]
    margins = np.array([margin(s, f, logps, ref, method).item() for s, f in pairs])
    out |= {
        "gal/abs_d": np.abs(margins).mean(),
        "gal/saturated": np.mean(np.abs(margins) > 5),
        "gal/corr_d_length": np.corrcoef(margins, [len(s["tokens"]) - len(f["tokens"]) for s, f in pairs])[0, 1],
    }
    leaves = [logps[row["item_id"]] for row in mid]
    grpo, gal = (
        torch.cat(torch.autograd.grad(parts[name], leaves, retain_graph=True, materialize_grads=True))
        for name in ("grpo", "gal")
    )
    out["gal/cos_grpo"] = (grpo @ gal / grpo.norm() / gal.norm()).item()

    sft_tokens, rl_tokens = sum(len(r["tokens"]) for r in hard), sum(len(r["tokens"]) for r in mid)
    out |= {
        "denom/rows": len(rows),
        "denom/groups": len(groups),
        "denom/pairs": len(pairs),
        "denom/sft_tokens": sft_tokens,
        "denom/rl_tokens": rl_tokens,
        "offline_ratio": len(hard) / (len(hard) + len(groups)),
        "offline_token_ratio": sft_tokens / (sft_tokens + rl_tokens),
    }
    return out
