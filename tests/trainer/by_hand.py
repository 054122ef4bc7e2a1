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


def pairs_of(group: Sequence[dict]) -> list[tuple[dict, dict]]:
    return [(s, f) for s in group for f in group if s["correct"] and not f["correct"]]


def margin(s: dict, f: dict, logps: Logps, ref: Mapping[str, list[float]], method: DypoMethod) -> Tensor:
    def summary(row: dict) -> Tensor:
        gain = logps[row["item_id"]]
        if method.gal.ref == "init":
            gain = gain - torch.tensor(ref[row["item_id"]], dtype=torch.float64)
        elif method.gal.ref == "old":
            gain = gain - torch.tensor(row["old_logprobs"], dtype=torch.float64)
        return gain.mean() if method.gal.logp_reduction == "mean" else gain.sum()

    return method.gal.beta * (summary(s) - summary(f))


def log_ratio(row: dict, logps: Logps) -> Tensor:
    return logps[row["item_id"]] - torch.tensor(row["old_logprobs"], dtype=torch.float64)


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
            ratio, advantage = log_ratio(row, logps).exp(), row["advantage"]
            if method.grpo.ratio == "sequence":
                ratio = log_ratio(row, logps).mean().exp().expand(len(ratio))
            clipped = ratio.clamp(1 - method.grpo.clip_low, 1 + method.grpo.clip_high)
            grpo = grpo - torch.minimum(ratio * advantage, clipped * advantage).mean() / len(group) / len(groups)
        for s, f in pairs_of(group):
            d = margin(s, f, logps, ref, method)
            gal = gal + torch.log1p(torch.exp(-d)) / len(pairs_of(group)) / len(groups)
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


def metrics(model: nn.Module, rows: Sequence[dict], ref: Mapping[str, list[float]], method: DypoMethod) -> dict[str, float]:
    """What docs/metrics.md says of a step with Hard and Mid rows, but for what is not in them: n, routes, rates, queues."""
    hard, mid, groups = [r for r in rows if r["route"] == "sft"], [r for r in rows if r["route"] == "rl"], groups_of(rows)
    with torch.no_grad():
        seen = {row["item_id"]: forward_alone(model, row) for row in rows}
    logps = {item: logps_T.requires_grad_() for item, (logps_T, _) in seen.items()}
    parts = losses(logps, rows, ref, method)
    out = {f"loss/{name}": value.item() for name, value in parts.items()}

    token_ratios = [x for row in mid for x in log_ratio(row, logps).tolist()]
    clipped = []
    for row in mid:
        logs = log_ratio(row, logps)
        for r in [logs.mean().exp().item()] if method.grpo.ratio == "sequence" else logs.exp().tolist():
            too_high = row["advantage"] > 0 and r > 1 + method.grpo.clip_high
            clipped.append(too_high or (row["advantage"] < 0 and r < 1 - method.grpo.clip_low))
    out |= {
        "entropy": np.mean([x for row in mid for x in seen[row["item_id"]][1].tolist()]),
        "clip_fraction": np.mean(clipped),
        "ess": effective(token_ratios),
        "ess_sequence": effective([log_ratio(row, logps).sum().item() for row in mid]),
        "kl": np.mean([np.exp(x) - 1 - x for x in token_ratios]),
        "reward": np.mean([row["reward"] for row in mid]),
        "age": np.mean([row["round"] - row["source_round"] for row in mid]),
        "completions/mean_length": np.mean([len(row["tokens"]) for row in mid]),
        "completions/clipped_ratio": np.mean([row["finish_reason"] == "length" for row in mid]),
    }

    pairs = [pair for group in groups for pair in pairs_of(group)]
    margins = np.array([margin(s, f, logps, ref, method).item() for s, f in pairs])
    out |= {
        "gal/abs_d": np.abs(margins).mean(),
        "gal/saturated": np.mean(np.abs(margins) > 5),
        "gal/corr_d_length": np.corrcoef(margins, [len(s["tokens"]) - len(f["tokens"]) for s, f in pairs])[0, 1],
    }
    leaves = [logps[row["item_id"]] for row in mid]
    grpo, gal = (torch.cat(torch.autograd.grad(parts[name], leaves, retain_graph=True)) for name in ("grpo", "gal"))
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
