"""`dypo probe variance`: reads a round's shards and a checkpoint, has the trainer measure, prints it. Writes nothing.

One idea: the trainer returns one dict of JSON values and `render` only draws it, so `--json` and the terminal cannot
disagree. The trainer is passed in by the CLI. Left out: what the numbers mean (docs/probe.md) and how they are computed.
"""

from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pipeline.context import Context
from pipeline.progress import progress
from pipeline.stage import current, need
from pipeline.stages import logprobs
from pipeline.stages.train import refuse_shards
from pipeline.store import partitions, read_parts
from schemas.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

LABELS = {"sft": "SFT", "grpo": "GRPO", "gal": "GAL", "mix": "mix"}
WITHIN_LABELS = {"trace_cov": "tr Cov", "signal": "|E g|^2", "noise_to_signal": "noise / signal"}
COLUMNS = {**WITHIN_LABELS, "direction_variance": "direction variance"}


class Trainer(Protocol):
    """What the CLI passes in: the module `trainer.api`."""

    VarianceJob: Any

    def probe_variance(self, job: Any) -> dict[str, Any]: ...


def variance(
    ctx: Context, trainer: Trainer, *, round: int | None, step: int | None, prompts: int, sketch: int
) -> dict[str, Any]:
    """Everything measured, and of what: run, round, step, policy, method. Default: the newest round with shards, at the
    policy that sampled it. UserError without shards, without that checkpoint, or with too few prompts."""
    r = _newest(ctx) if round is None else round
    for route in ("rl", "sft"):
        need(ctx.run, "shards", {"round": r, "route": route}, command=f"dypo grade {ctx.run} --round {r}")
    files = [f for route in ("rl", "sft") for f in ctx.part("shards", round=r, route=route).files()]
    shards = read_parts(files, "shards")
    sampler = ctx.policy_of(r)
    refuse_shards(ctx, r, shards, empty_ok=False)
    folder, policy = sampler if step in (None, 0) else ctx.checkpoint(r, step)
    ctx.verify_policy(folder)
    method = ctx.recipe.train.method
    with progress(f"probe variance round {r}", 0, unit="prompts") as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.to(done)

        measured = trainer.probe_variance(
            trainer.VarianceJob(
                round=r, seed=ctx.recipe.seed, train=ctx.recipe.train, policy=ctx.recipe.policy, folder=folder,
                base=ctx.recipe.policy.model, shards=shards, ref=_reference(ctx, r), prompts=prompts, sketch=sketch, tell=tell,
            )
        )  # fmt: skip
    return {
        "run": str(ctx.run),
        "round": r,
        "step": step or 0,
        "policy": policy,
        "on_policy": {policy} == set(shards.column("policy").to_pylist()),
        "method": method.model_dump(mode="json"),
        **measured,
    }


def _newest(ctx: Context) -> int:
    rounds = [int(dict(p.keys)["round"]) for p in partitions(ctx.run, "shards")]
    if not rounds:
        raise UserError(f"{ctx.run}: no shards yet, so no gated prompt. Run `dypo grade {ctx.run}` first")
    return max(rounds)


def _reference(ctx: Context, round: int) -> pa.Table | None:
    """The round's stored reference log-probs, if training wrote those of these very shards."""
    if not ctx.recipe.train.method.loss.needs_reference or not current(logprobs.spec(ctx, round, "ref")):
        return None
    need(ctx.run, "logprobs", {"round": round, "role": "ref"}, command=f"dypo train {ctx.run} --round {round}")
    return read_parts(ctx.part("logprobs", round=round, role="ref").files(), "logprobs")


# ---------------------------------------------------------------- printing
def render(found: dict[str, Any]) -> "Group":
    """Tables and sentences of what `variance` returned."""
    from rich.console import Group
    from rich.text import Text

    n, gated = found["prompts"], found["gated"]
    width = "exact gradients" if found["sketch"] is None else f"gradients sketched to {found['sketch']:,} numbers"
    lines: list[Any] = [
        Text(
            f"round {found['round']}, {_at(found)}\n{n['rl']} of {gated['rl']} Mid prompts, {n['sft']} of {gated['sft']} Hard "
            f"ones; {found['parameters']:,} parameters, {width}; 95 % intervals over prompts"
        ),
        Text("\nBetween prompts: one prompt is one draw", style="bold"),
        _table(found["components"], COLUMNS),
        Text(""),
        _pairs(found["pairs"]),
    ]
    lines += [Text(line) for line in _left_out(found)]
    if found["eq19"]:
        lines += [Text("\nEq. 19 between prompts", style="bold"), Text(_claim(found["eq19"], found["weights"]))]
    within = found["sampling"]
    if within:
        size = " or ".join(map(str, within["group_sizes"]))
        lines += [
            Text(f"\nWithin prompts: sampling noise at group size {size}, {within['prompts']} prompts", style="bold"),
            _table(within["components"], WITHIN_LABELS),
        ]
        if within["eq19"]:
            lines += [Text("\nEq. 19 within prompts", style="bold"), Text(_claim(within["eq19"], found["weights"]))]
    return Group(*lines)


def _at(found: dict[str, Any]) -> str:
    if found["on_policy"]:
        return f"at the policy that sampled it ({found['policy'][:12]})"
    return (
        f"at step {found['step']} ({found['policy'][:12]}), not the policy that sampled it: stored ratios and clipping apply"
    )


def _left_out(found: dict[str, Any]) -> list[str]:
    """Why something that was asked for is not there."""
    out = []
    for route, names in (("rl", "GRPO, GAL and mix (Mid prompts)"), ("sft", "SFT (Hard prompts)")):
        if found["prompts"][route] == 0:
            out.append(f"{names}: not measured, {found['gated'][route]} prompts; at least {found['min_prompts']} are needed")
    if found["prompts"]["rl"] and "gal" not in found["components"]:
        out.append("GAL and mix: not measured, GAL's weight in the loss is 0")
    if found["prompts"]["rl"] and found["left_one_out"]:
        out.append("within prompts: not measured, leave_one_out made groups that halves are not like")
    elif found["prompts"]["rl"] and found["sampling"] is None:
        out.append(
            "within prompts: not measured, fewer than "
            f"{found['min_prompts']} groups of even size can be cut into two halves that are both mixed"
        )
    return out


def _claim(eq: dict[str, Any], weights: dict[str, float]) -> str:
    """Eq. 19's claim against what was measured, in words."""
    ratio, nts = eq["variance_ratio"], eq["noise_to_signal_ratio"]
    verdict = {
        "below": "The claim holds on these rows: the mix varies less than GRPO",
        "above": "The claim does not hold on these rows: the mix varies more than GRPO",
        None: "These rows do not decide the claim: the interval holds 1",
    }[_side(ratio)]
    relative = {
        "below": "and relative to its signal, which no scale of a loss can change, less too"
        if _side(ratio) == "below"
        else "but relative to its signal, which no scale of a loss can change, less",
        "above": "and relative to its signal, which no scale of a loss can change, more too"
        if _side(ratio) == "above"
        else "but relative to its signal, which no scale of a loss can change, more",
        None: "relative to its signal, which no scale of a loss can change, no difference is shown",
    }[_side(nts)]
    return (
        f"tr Cov({weights['grpo']:g} GRPO + {weights['gal']:g} GAL) / tr Cov(GRPO) = {_cell(ratio)}\n"
        f"if the two were independent: {_cell(eq['if_independent'])}; noise correlation {_cell(eq['noise_correlation'])}, "
        f"cosine of the means {_cell(eq['cosine'])}\n"
        f"noise / signal: GRPO {_cell(eq['noise_to_signal_grpo'])}, mix {_cell(eq['noise_to_signal_mix'])}; "
        f"mix over GRPO {_cell(nts)}\n"
        f"least at alpha {_cell(eq['best_alpha'])}, where it is {_cell(eq['noise_to_signal_best'])} of GRPO's\n{verdict}; {relative}."
    )


def _side(found: dict[str, float | None]) -> str | None:
    """Whether an interval lies below or above 1."""
    if found["ci_high"] is not None and found["ci_high"] < 1:
        return "below"
    return "above" if found["ci_low"] is not None and found["ci_low"] > 1 else None


def _table(components: dict[str, dict[str, Any]], columns: dict[str, str]) -> "Table":
    from rich.table import Table

    t = Table("component", *columns.values(), box=None, pad_edge=False, header_style="bold")
    for name, numbers in components.items():
        t.add_row(LABELS[name], *(_cell(numbers[c]) for c in columns))
    return t


def _pairs(pairs: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    t = Table("pair", "cosine of the means", "noise correlation", box=None, pad_edge=False, header_style="bold")
    for pair in pairs:
        noise = "other prompts" if pair["noise_correlation"] is None else _cell(pair["noise_correlation"])
        t.add_row(f"{LABELS[pair['a']]}, {LABELS[pair['b']]}", _cell(pair["cosine"]), noise)
    return t


def _cell(found: dict[str, float | None]) -> str:
    """`1.29 [1.22, 1.37]`; a missing end has no bound, a missing value is not measurable."""
    value, low, high = (found[k] for k in ("value", "ci_low", "ci_high"))
    if value is None:
        return "not measurable"
    ends = ("-inf" if low is None else f"{low:.3g}", "inf" if high is None else f"{high:.3g}")
    return f"{value:.3g} [{ends[0]}, {ends[1]}]"
