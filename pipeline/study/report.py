"""The report of a study: tables and pictures of what results.py says, as one HTML file and one Markdown file.

One idea: the page is a list of blocks that both writers go through, so the two cannot disagree; Markdown leaves out the pictures.
Results that are missing are in every table's first number. Tables and pictures are drawn by pipeline/page.py.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline import page
from pipeline.comparison import PairedTest
from pipeline.study import cells
from pipeline.study.layout import Cell, Plan
from pipeline.study.results import Compared, Results, Row, Values, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = (
    ("Offline ratio", "hard / (hard + mid) among the step's prompts (paper, Figure 4)", "offline_ratio"),
    ("Train reward", "mean verdict of the step's rollouts (Figure 4)", "reward"),
    ("Policy entropy", "nats a token (Figure 4)", "entropy"),
    ("Gradient norm", "before clipping (Figure 5)", "grad_norm"),
)
SHOWN = 8  # methods in one picture


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    draw: Callable[..., None]
    series: Any


Block = Heading | Text | Table | Picture


def build(plan: Plan, done: Sequence[Cell]) -> tuple[str, str]:
    """The study's page as HTML and as Markdown, of the results that are finished."""
    blocks = [*_all(Results(plan, done))]
    return _html(plan, blocks), _markdown(plan, blocks)


def _all(found: Results) -> list[Block]:
    study = found.plan.study
    finals, at_budget = found.rows("finals"), found.rows("at_budget")
    blocks: list[Block] = [*_state(found)]
    for world in study.worlds:
        blocks.append(Heading(f"World {world.name}"))
        if not any(row["world"] == world.name for row in finals):
            blocks.append(Text("No result yet."))
            continue
        values, before = found.values(world.name, finals), found.values(world.name, finals, "before")
        blocks += _methods(found, world.name, values, before, "At equal updates", _spent_columns(found, world.name))
        if world.rollout_tokens is not None:
            title = f"At equal generated tokens: at most {world.rollout_tokens:,} of rollouts"
            columns = _budget_columns(at_budget, world.name)
            blocks += _methods(found, world.name, found.values(world.name, at_budget), before, title, columns)
        blocks += _by_base(found, world.name, values)
        blocks += _grid(found, world.name, values)
        blocks += _learning(found, world.name)
        blocks += _curves(found, world.name)
        blocks += _steadiness(found, world.name)
    blocks += _trials(found)
    blocks += _probes(found)
    return blocks


# ---------------------------------------------------------------- blocks
def _state(found: Results) -> list[Block]:
    study = found.plan.study
    wanted = sum(found.wanted(w.name) for w in study.worlds) * len(study.methods)
    words = (
        f"{len(found.cells)} of {wanted} results: {len(study.methods)} methods, {len(study.seeds)} seeds, "
        f"{', '.join(f'{len(w.bases)} base policies in world {w.name}' for w in study.worlds)}. Values are avg@n in per cent, mean over "
        "results with Student's 95 % interval; a difference is over pairs of results with the same base and seed, with the p value of an "
        "exact sign-flip test (drawn beyond 15 pairs) and, in brackets, after Holm's correction over all comparisons of its column group. "
        "Pairs of one base are alike, so a claim is about these bases."
    )
    return [Text(words)]


def _methods(
    found: Results,
    world: str,
    values: dict[str, Values],
    before: dict[str, Values],
    title: str,
    more: Mapping[str, Mapping[str, str]],
) -> list[Block]:
    """Every method on every measure, then the paired differences to the references on the main measure and outside."""
    study, measures = found.plan.study, found.measures(world)
    extra = list(next(iter(more.values()), {}))
    wanted = found.wanted(world)
    rows = []
    if before:
        bases = {m: {u: v for of in before[m].values() for u, v in of.items()} for m in measures}
        rows.append(["(base policy)", "", *(_value(interval(bases[m].values())) for m in measures), *("" for _ in extra)])
    for method in study.methods:
        of = {m: values[m].get(method.name, {}) for m in measures}
        have = len(next(iter(of.values())))
        cost = more.get(method.name, {})
        rows.append(
            [
                method.name,
                f"{have} of {wanted}",
                *(_value(interval(of[m].values())) for m in measures),
                *(cost.get(e, "") for e in extra),
            ]
        )
    blocks: list[Block] = [Heading(title, 3), Table(["method", "results", *measures, *extra], rows)]
    if study.references:
        compared = {m: found.compared(values[m]) for m in measures}
        head = ["method", *(f"{m} - {r}" for m in measures for r in study.references)]
        rows = [
            [method.name, *(_difference(compared[m].get((method.name, r))) for m in measures for r in study.references)]
            for method in study.methods
        ]
        blocks += [Text("Paired differences, in points:"), Table(head, rows)]
    return blocks


def _spent_columns(found: Results, world: str) -> dict[str, dict[str, str]]:
    names = {
        "updates": "updates",
        "rollout_tokens": "rollout tokens",
        "trace_tokens": "trace tokens fed",
        "rl_tokens": "rollout tokens fed",
    }
    return {
        method: {said: f"{row[name]:,.0f}" for name, said in names.items()}
        for (of, method), row in found.spent().items()
        if of == world
    }


def _budget_columns(rows: list[Row], world: str) -> dict[str, dict[str, str]]:
    of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["world"] == world:
            of[row["method"]].append(row)
    return {
        method: {
            "rounds": f"{fmean(r['round'] + (r['tokens'] > 0 or r['round'] > 0) for r in mine):.1f}",
            "rollout tokens": f"{fmean(r['tokens'] for r in mine):,.0f}",
        }
        for method, mine in of.items()
    }


def _by_base(found: Results, world: str, values: dict[str, Values]) -> list[Block]:
    """The mean of each base, since results of one base are alike."""
    bases = list(found.plan.world(world).bases)
    if len(bases) < 2:
        return []
    measures = found.measures(world)
    rows = [
        [m.name, *(_mean_of(values[measure].get(m.name, {}), base) for measure in measures for base in bases)]
        for m in found.plan.study.methods
    ]
    return [Heading("By base policy", 3), Table(["method", *(f"{m}, {b}" for m in measures for b in bases)], rows)]


def _mean_of(units: Mapping[tuple[str, int], float], base: str) -> str:
    of = [value for (b, _), value in units.items() if b == base]
    return f"{100 * fmean(of):.1f}" if of else "missing"


def _steadiness(found: Results, world: str) -> list[Block]:
    """Figures 4 and 5 in numbers: the gradient norm's variation, compared pair by pair, and the offline ratio's fall."""
    rows = [r for r in found.rows("steadiness") if r["world"] == world]
    variation: Values = defaultdict(dict)
    fell: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in rows:
        if r["variation"] is not None:
            variation[r["method"]][r["base"], r["seed"]] = r["variation"]
        if r["offline_first"] is not None and r["offline_last"] is not None:
            fell[r["method"]].append((r["offline_first"], r["offline_last"]))
    compared, references = found.compared(variation), found.plan.study.references
    lines = []
    for m in found.plan.study.methods:
        ends = fell[m.name]
        offline = [f"{fmean(e[n] for e in ends):.2f}" if ends else "" for n in (0, 1)]
        lower = f"{sum(b < a for a, b in ends)} of {len(ends)}" if ends else ""
        own = interval(variation[m.name].values())
        lines.append(
            [m.name, _plain(own), *(_difference(compared.get((m.name, r)), 1) for r in references), *offline, lower]
        )
    head = [
        "method",
        "variation",
        *(f"variation - {r}" for r in references),
        "offline, first round",
        "last round",
        "lower in",
    ]
    words = "Variation: of the gradient's norm over a run's steps, standard deviation over mean. Offline: hard / (hard + mid) among trained prompts."
    return [Heading("Steadiness and offline ratio", 3), Text(words), Table(head, lines)]


def _plain(test: PairedTest | None) -> str:
    if test is None:
        return ""
    return f"{test.mean:.2f}" if test.n == 1 else f"{test.mean:.2f} [{test.ci_low:.2f}, {test.ci_high:.2f}]"


def _grid(found: Results, world: str, values: dict[str, Values]) -> list[Block]:
    grid, plan = found.plan.study.grid, found.plan
    if grid is None:
        return []
    at: dict[tuple[Any, Any], str] = {}
    for method in plan.study.methods:
        recipe = plan.context(Cell(world, next(iter(plan.world(world).bases)), method.name, plan.study.seeds[0])).recipe
        dumped = recipe.model_dump(mode="json")
        at[_dotted(dumped, grid.rows), _dotted(dumped, grid.columns)] = method.name
    rows, columns = sorted({r for r, _ in at}), sorted({c for _, c in at})
    blocks: list[Block] = []
    for measure in found.measures(world):
        cells_of = [
            [f"{r:g}", *(_value(interval(values[measure].get(at.get((r, c), ""), {}).values())) for c in columns)]
            for r in rows
        ]
        blocks += [
            Heading(f"{measure}: {grid.rows} by {grid.columns}", 3),
            Table([grid.rows, *(f"{c:g}" for c in columns)], cells_of),
        ]
    return blocks


def _dotted(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _learning(found: Results, world: str) -> list[Block]:
    suite = found.plan.study.tuning.suite
    series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in found.rows("learning", suite=suite):
        if row["world"] == world:
            series[row["method"]].append((row["rounds"], 100 * row["value"], 100 * (row["half"] or 0.0)))
    caption = f"{suite}, per cent right by rounds of training; bands: 95 % of the mean over results"
    return _pictures(found, f"Learning curves, world {world}", caption, series)


def _curves(found: Results, world: str) -> list[Block]:
    rows = [r for r in found.rows("curves", names=[name for _, _, name in CURVES]) if r["world"] == world]
    blocks: list[Block] = []
    for title, caption, name in CURVES:
        series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for row in rows:
            if row["name"] == name:
                series[row["method"]].append((row["x"], row["value"], row["half"] or 0.0))
        blocks += _pictures(found, f"{title}, world {world}", f"{caption}; by optimizer updates, running means", series)
    return blocks


def _pictures(found: Results, title: str, caption: str, series: Mapping[str, list]) -> list[Block]:
    """The methods in the study's order, some to a picture."""
    places = {m.name: n for n, m in enumerate(found.plan.study.methods)}
    present = [m for m in places if m in series]
    parts = [present[i : i + SHOWN] for i in range(0, len(present), SHOWN)]
    names = [title] * len(parts) if len(parts) < 2 else [f"{title}, {i + 1}" for i in range(len(parts))]
    return [
        Picture(name, caption, _draw, {m: (places[m], series[m]) for m in part})
        for name, part in zip(names, parts, strict=True)
    ]


def _trials(found: Results) -> list[Block]:
    plan, rows = found.plan, []
    for world in plan.study.worlds:
        for method in plan.study.methods:
            if method.tuned_as is not None:
                continue
            trials = plan.trials(world.name, method.name)
            values = [cells.validation(plan, t) for t in trials]
            taken = cells.best(values)
            shown = []
            for n, (setting, value) in enumerate(zip(plan.study.trials_of(method), values, strict=bool(trials))):
                said = "not there" if value is None else f"{100 * value:.1f}"
                words = ", ".join(f"{k} {v:g}" for k, v in setting.items())
                shown.append(f"{words}: {f'**{said}**' if n == taken else said}")
            if shown:
                rows.append([world.name, method.name, *shown])
    if not rows:
        return []
    tuning, width = plan.study.tuning, max(map(len, rows)) - 2
    words = f"By {tuning.suite}, avg@n in per cent, on base {tuning.base} with seed {tuning.seed}; the chosen one is bold (of equals the first)."
    head = ["world", "method", *(f"trial {n}" for n in range(width))]
    return [Heading("Trials"), Text(words), Table(head, [r + [""] * (width + 2 - len(r)) for r in rows])]


def _probes(found: Results) -> list[Block]:
    probe = found.plan.study.probe
    if probe is None:
        return []
    names = (
        "variance_ratio",
        "if_independent",
        "noise_correlation",
        "noise_to_signal_ratio",
        "best_alpha",
        "noise_to_signal_best",
    )
    rows = []
    for cell in [c for c in found.cells if (c.method, c.seed) == (probe.method, probe.seed)]:
        for told in cells.probes(found.plan, cell):
            where, parts, eq = [cell.world, cell.base, str(told["round"])], told["components"], told["eq19"]
            if eq is None:
                rows.append([*where, "too few Mid prompts", *("" for _ in range(8))])
            else:
                of_each = (_measured(parts[c]["trace_cov"]) for c in ("grpo", "gal", "mix"))
                rows.append([*where, *of_each, *(_measured(eq[n]) for n in names)])
    head = (
        "world", "base", "round", "tr Cov GRPO", "tr Cov GAL", "tr Cov mix", "mix / GRPO", "if independent",
        "noise correlation", "mix over GRPO, noise / signal", "alpha of the least", "there over GRPO",
    )  # fmt: skip
    words = f"Paper Eq. 19, measured by `dypo probe variance` on {probe.method}'s stored rows, seed {probe.seed} (docs/probe.md)."
    return [Heading("Gradient variance"), Text(words), Table(head, rows) if rows else Text("Not measured yet.")]


# ---------------------------------------------------------------- cells of tables
def _value(test: PairedTest | None) -> str:
    if test is None:
        return "missing"
    if test.n == 1:
        return f"{100 * test.mean:.1f}"
    return f"{100 * test.mean:.1f} [{100 * test.ci_low:.1f}, {100 * test.ci_high:.1f}]"


def _difference(found: Compared | None, scale: int = 100) -> str:
    """In points, or with scale 1 in the measure's own unit."""
    if found is None:
        return ""
    t, digits = found.test, 1 if scale == 100 else 2
    ends = "" if t.n == 1 else f" [{scale * t.ci_low:+.{digits}f}, {scale * t.ci_high:+.{digits}f}]"
    return f"{scale * t.mean:+.{digits}f}{ends} p {_p(t.p)} ({_p(found.adjusted)}), n {t.n}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _measured(found: Mapping[str, float | None]) -> str:
    value, low, high = (found[k] for k in ("value", "ci_low", "ci_high"))
    if value is None:
        return "not measurable"
    return f"{value:.3g} [{'-inf' if low is None else f'{low:.3g}'}, {'inf' if high is None else f'{high:.3g}'}]"


# ---------------------------------------------------------------- writers
def _html(plan: Plan, blocks: Sequence[Block]) -> str:
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"<h{block.level}>{page.text(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            out.append(f"<p class=note>{page.text(block.text)}</p>")
        elif isinstance(block, Table):
            rows = [[_bold(page.text(c)) for c in row] for row in block.rows]
            out.append(page.table([page.text(h) for h in block.head], rows, range(1, len(block.head))))
        else:
            out.append(page.figure(block.title, block.caption, block.draw, block.series, wide=True))
    return page.whole(plan.study.title, f"study {page.text(plan.study.name)}", "", "".join(out))


def _bold(cell: str) -> str:
    first, mark, rest = cell.partition("**")
    return f"{first}<b>{rest.removesuffix('**')}</b>" if mark else cell


def _markdown(plan: Plan, blocks: Sequence[Block]) -> str:
    out = [f"# {plan.study.title}"]
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            out.append(block.text)
        elif isinstance(block, Table):
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            out.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(out) + "\n"


def _draw(fig: "Figure", series: Mapping[str, tuple[int, list[tuple[float, float, float]]]]) -> None:
    """Lines with bands, both smoothed: by name, the method's place (its colour in every picture) and (x, value, half of the interval)."""
    ax = fig.subplots()
    for name, (place, points) in series.items():
        x, y, half = (list(column) for column in zip(*points, strict=True))
        y, half = page.smooth(y), page.smooth(half)
        colour, dashes = page.LINES[place % len(page.LINES)], "--" if place // len(page.LINES) % 2 else "-"
        low, high = ([v + sign * h for v, h in zip(y, half, strict=True)] for sign in (-1, 1))
        ax.plot(x, y, color=colour, ls=dashes, lw=1.6, label=name)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    page.whole_ticks(ax)
    fig.legend(loc="outside right upper")
