"""The report: one HTML file that shows what a run did, with no script, no network and nothing to install.

One idea: every number comes from a query in sql/report/ over the run's own tables, so whatever the page says can be
asked again with `dypo sql`. Same tables, same bytes: nothing on the page is a date or a random id of its own.

Whatever a model, a teacher or a data set wrote is hostile until escaped: all of it goes through `page.text`, and the page's
Content-Security-Policy forbids scripts and requests besides. A table without rows gives a sentence, never an error.
Left out: anything that moves. For zooming and slicing there is SQL.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import page
from pipeline.page import INK, LINES, MUTED
from pipeline.statistics import Estimate, paired_difference, pass_at_k
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.scorers import STATUSES
from schemas.tables import REASONS

if TYPE_CHECKING:
    import duckdb
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

GRADES = ("easy", "mid", "hard")
GRADE_COLOUR = {"easy": "#2a9187", "mid": "#e3a23a", "hard": "#b5405f"}
STATUS_COLOUR = {
    "ok": "#2a9187",
    "wrong": "#b5405f",
    "unparseable": "#8c6bb1",
    "truncated": "#e3a23a",
    "timeout": "#7b8794",
    "gold_bad": "#3e4c59",
    "error": "#111827",
}
REASON_MEANING = {
    "sft": "Hard with a verified trace: supervised on a teacher",
    "rl": "Mid: the whole group is trained on",
    "easy": "all rollouts right: nothing to learn from",
    "no_verified_trace": "Hard, and no teacher solved it within the length limit",
    "too_long": "prompt and response are past the length limit",
    "unjudged": "a verdict of the group is timeout, error or gold_bad",
    "incomplete_group": "fewer than k rollouts",
    "stale": "its rollouts are of an older round than allowed",
}
SHOWN_CHARACTERS = 1500
SHOWN_PROMPTS = 3


def build_report(con: "duckdb.DuckDBPyConnection", recipe: Recipe | None, manifests: Sequence[Manifest]) -> str:
    """The whole page. `con` has one view per table, each possibly empty; without a recipe the page says less."""
    sections = (
        ("Results", _results(con, recipe)),
        ("Difficulty", _difficulty(con)),
        ("Training", _training(con)),
        ("Verdicts and teachers", _verdicts(con) + _teachers(con)),
        ("Sample rollouts", _samples(con)),
        ("Provenance", _provenance(con, recipe, manifests)),
    )
    name = recipe.name if recipe else "run"
    anchors = [title.split()[0].lower() for title, _ in sections]
    nav = "".join(f'<a href="#{a}">{page.text(t)}</a>' for a, (t, _) in zip(anchors, sections, strict=True))
    body = "".join(
        f'<section id="{a}"><h2>{page.text(t)}</h2>{s}</section>' for a, (t, s) in zip(anchors, sections, strict=True)
    )
    return page.whole(name, _subtitle(recipe), f"<nav>{nav}</nav>", f"{_headline(con, recipe)}{body}")


# ---------------------------------------------------------------- small pieces
def _rows(con: "duckdb.DuckDBPyConnection", query: str, **parameters: Any) -> list[Row]:
    """All rows of sql/report/QUERY.sql, drained, so the connection is free for whoever uses it next."""
    sql = (Path(__file__).parent / "sql" / "report" / f"{query}.sql").read_text(encoding="utf-8")
    result = con.execute(sql, parameters) if parameters else con.execute(sql)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part / whole, 0)})" if whole else "0"


def _interval(low: float, high: float) -> str:
    return f'<span class="ci">{100 * low:.1f} to {100 * high:.1f}</span>'


def _chip(grade: str) -> str:
    return f'<span class="chip" style="background:{GRADE_COLOUR.get(grade, MUTED)}">{page.text(grade)}</span>'


def _bar(parts: Mapping[str, int], colours: Mapping[str, str]) -> str:
    """A stacked bar of one line; the title of each piece says its name and count."""
    whole = sum(parts.values()) or 1
    pieces = "".join(
        f'<i style="width:{100 * n / whole:.2f}%;background:{colours[key]}" title="{page.text(key)}: {n}"></i>'
        for key, n in parts.items()
        if n
    )
    return f'<span class="bar">{pieces}</span>'


def _subtitle(recipe: Recipe | None) -> str:
    if recipe is None:
        return "dypo report, made without a recipe"
    method = recipe.train.method
    facts = [
        f"method {method.type}",
        f"{recipe.rounds} rounds of up to {recipe.train.steps} steps",
        f"k = {recipe.rollouts.k}",
        f"teachers: {', '.join(t.name for t in recipe.teachers) or 'none'}",
        f"base policy {recipe.policy.model.name}",
        f"seed {recipe.seed}",
    ]
    return " · ".join(page.text(f) for f in facts)


# ---------------------------------------------------------------- headline and results
def _headline(con: "duckdb.DuckDBPyConnection", recipe: Recipe | None) -> str:
    o = _rows(con, "overview")[0]
    cards: list[tuple[str, str, str]] = []  # title and figure are text, the note is HTML
    outside = _outside(recipe)
    evals = sorted(_suites(_rows(con, "evals")).items(), key=lambda item: (outside.get(item[0][0], False), item[0]))
    for (suite, metric), points in evals:
        if metric.startswith("avg@"):
            first, last = points[0], points[-1]
            moved = len(points) > 1
            figure = f"{_percent(first['value'])} → {_percent(last['value'])}" if moved else _percent(first["value"])
            change = f"{100 * (last['value'] - first['value']):+.1f} points" if moved else "one policy evaluated"
            kind = ", out of distribution" if outside.get(suite) else ""
            cards.append((f"{suite}, {metric}{kind}", figure, f"{change}, {last['problems']:,} problems"))
    mix = _by_round(_rows(con, "grade_mix"), "grade")
    if mix:
        last = max(mix)
        shares = " / ".join(f"{100 * mix[last][g] / max(1, sum(mix[last].values())):.0f}" for g in GRADES)
        cards.append((f"easy / mid / hard, round {last}", f"{shares} %", _bar(mix[last], GRADE_COLOUR)))
    cards += [
        ("training", f"{o['steps']:,} steps", f"{o['trained_sequences']:,} sequences, {o['trained_tokens']:,} tokens"),
        ("rollouts", f"{o['rollouts']:,}", f"{o['rollout_tokens']:,} tokens over {o['train_prompts']:,} prompts"),
        ("teacher traces", f"{o['traces']:,}", f"{o['rounds']} graded rounds, {o['eval_prompts']:,} eval prompts"),
    ]
    shown = (
        f'<div class="card"><b>{page.text(title)}</b><strong>{page.text(figure)}</strong><span>{note}</span></div>'
        for title, figure, note in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _suites(evals: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Points of each (suite, metric), in the order of training."""
    out: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in evals:
        out[row["suite"], row["metric"]].append(row)
    return dict(out)


def _outside(recipe: Recipe | None) -> dict[str, bool]:
    """Which suites are out of distribution, as far as a recipe says."""
    return {s.name: s.out_of_distribution for s in recipe.eval.suites} if recipe else {}


def _results(con: "duckdb.DuckDBPyConnection", recipe: Recipe | None) -> str:
    evals = _suites(_rows(con, "evals"))
    if not evals:
        return page.missing("No evals yet: `dypo eval` writes them.")
    problems = defaultdict(dict)
    for row in _rows(con, "eval_problems"):
        problems[row["suite"], row["round"], row["step"]][row["prompt_id"]] = (row["samples"], row["correct"])
    outside = _outside(recipe)

    def one(points: list[Row]) -> list[str]:
        first, last = points[0], points[-1]
        suite, metric = first["suite"], first["metric"]
        kind = {True: "out of distribution", False: "in distribution", None: ""}[outside.get(suite)]
        cells = [page.text(suite), kind, page.text(metric), f"{last['problems']:,}"]
        for p in (first, last):
            cells += [_percent(p["value"]), _interval(p["ci_low"], p["ci_high"])]
        if len(points) == 1:
            return [*cells[:6], "", "", "", ""]
        change = _change(
            metric, problems[suite, first["round"], first["step"]], problems[suite, last["round"], last["step"]]
        )
        plain = f"{100 * (last['value'] - first['value']):+.1f}"
        return [*cells, f"<b>{plain}</b>", _interval(change.ci_low, change.ci_high) if change else ""]

    head = (
        "suite",
        "",
        "metric",
        "problems",
        "before",
        "95 % interval",
        "after",
        "95 % interval",
        "change",
        "95 % interval",
    )
    rows = sorted((one(points) for points in evals.values()), key=lambda cells: (cells[1], cells[0]))
    note = (
        "<p class=note>Before: the first policy evaluated. After: the last one. Intervals are over problems (samples of one "
        "problem are not independent); the change compares the same problems, in points.</p>"
    )
    picture = page.figure(
        "Evals by checkpoint",
        "95 % intervals over problems; dashed: out of distribution",
        _draw_evals,
        evals,
        outside,
        wide=True,
    )
    return page.table(head, rows, (3, 4, 6, 8)) + note + picture


def _change(metric: str, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> Estimate | None:
    """The paired change of avg@n or pass@k over the problems that both have; None for a metric of another name."""
    name, _, number = metric.partition("@")
    if name not in ("avg", "pass") or not number.isdigit() or before.keys() != after.keys() or not before:
        return None

    def value(samples: int, correct: int) -> float:
        return correct / samples if name == "avg" else pass_at_k(samples, correct, int(number))

    if name == "pass" and min(n for n, _ in [*before.values(), *after.values()]) < int(number):
        return None
    return paired_difference([value(*before[p]) for p in before], [value(*after[p]) for p in before])


# ---------------------------------------------------------------- difficulty
def _by_round(rows: Iterable[Row], key: str, count: str = "prompts") -> dict[int, dict[str, int]]:
    out: dict[int, dict[str, int]] = defaultdict(dict)
    for row in rows:
        out[row["round"]][row[key]] = out[row["round"]].get(row[key], 0) + row[count]
    return {r: {g: parts[g] for g in GRADES} if key == "grade" else parts for r, parts in out.items()}


def _difficulty(con: "duckdb.DuckDBPyConnection") -> str:
    mix = _by_round(_rows(con, "grade_mix"), "grade")
    if not mix:
        return page.missing("No grades yet: `dypo grade` writes them.")
    table = []
    for r, parts in mix.items():
        whole = sum(parts.values())
        table.append([str(r), f"{whole:,}", *(_share(parts[g], whole) for g in GRADES), _bar(parts, GRADE_COLOUR)])
    grades = page.table(("round", "prompts", *(_chip(g) for g in GRADES), ""), table, range(5))
    picture = page.figure("Grade shares by round", "per cent of the prompts graded in the round", _draw_grades, mix)
    return f'<div class="grid">{picture}<div>{grades}{_transitions(con)}</div></div>{_reasons(con)}'


def _reasons(con: "duckdb.DuckDBPyConnection") -> str:
    counts = _by_round(_rows(con, "reasons"), "reason")
    found = {r for parts in counts.values() for r in parts}
    seen = [r for r in REASONS if r in found] + sorted(found - set(REASONS))  # a grading query of the user's may add some
    rounds = sorted(counts)[-6:]
    rows = [
        [
            f"<code>{page.text(r)}</code>",
            *(f"{counts[n].get(r, 0):,}" for n in rounds),
            f'<span class="ci">{page.text(REASON_MEANING.get(r, ""))}</span>',
        ]
        for r in seen
    ]
    return "<h3>Where prompts go by DYPO's gates, and why not</h3>" + page.table(
        ("reason", *(f"round {n}" for n in rounds), ""), rows, range(1, len(rounds) + 1)
    )


def _transitions(con: "duckdb.DuckDBPyConnection") -> str:
    pairs: dict[tuple[int, int], dict[tuple[str, str], int]] = defaultdict(dict)
    for row in _rows(con, "transitions"):
        pairs[row["from_round"], row["to_round"]][row["from_grade"], row["to_grade"]] = row["prompts"]
    if not pairs:
        return "<h3>Grade transitions</h3>" + page.missing("No prompt has been graded in two rounds yet.")
    blocks = []
    for (a, b), moves in sorted(pairs.items())[-4:]:
        lines = []
        for g in GRADES:
            whole = sum(moves.get((g, to), 0) for to in GRADES)
            cells = "".join(_shaded(moves.get((g, to), 0), whole, GRADE_COLOUR[to]) for to in GRADES)
            lines.append(f"<tr><th>{_chip(g)}</th>{cells}</tr>")
        head = "".join(f"<th>{_chip(g)}</th>" for g in GRADES)
        blocks.append(
            f'<table class="moves"><caption>round {a} (rows) to {b} (columns)</caption>'
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        )
    note = (
        "<p class=note>Prompts by grade before and after; the share is of the row. Hard to mid is progress, easy to hard "
        "is forgetting.</p>"
    )
    return f'<h3>Grade transitions</h3><div class="row">{"".join(blocks)}</div>{note}'


def _shaded(n: int, whole: int, colour: str) -> str:
    share = n / whole if whole else 0.0
    alpha = f"{round(share * 110):02x}"
    said = f"{n:,}<small>{_percent(share, 0)}</small>" if n else "·"
    return f'<td style="background:{colour}{alpha}">{said}</td>'


# ---------------------------------------------------------------- training
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Train reward", "mean verdict of the step's rollouts", (("reward", "reward"),)),
    ("Offline ratio", "hard / (hard + mid) among the step's prompts", (("offline_ratio", "offline ratio"),)),
    ("Policy entropy", "nats per token", (("entropy", "entropy"),)),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    ("Response length", "mean tokens of the step's rollouts", (("completions/mean_length", "tokens"),)),
    (
        "Off-policy health",
        "effective sample size (1: on-policy), clipped share",
        (("ess", "ESS"), ("clip_fraction", "clip fraction")),
    ),
    ("KL to the sampling policy", "nats per token", (("kl", "KL"),)),
    ("Learning rate", "of the policy's optimizer", (("lr", "learning rate"),)),
)
LOSSES = (("loss/total", "total"), ("loss/sft", "SFT"), ("loss/grpo", "GRPO"), ("loss/gal", "GAL"))


def _training(con: "duckdb.DuckDBPyConnection") -> str:
    wanted = [name for _, _, series in PANELS for name, _ in series] + [name for name, _ in LOSSES]
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in _rows(con, "metrics", names=wanted):
        curves[row["name"]].append(row)
    if not curves:
        return page.missing("No training metrics yet: `dypo train` writes them.") + _fed(con)
    figures = []
    for title, caption, series in PANELS:
        if present := [(label, curves[name]) for name, label in series if name in curves]:
            figures.append(page.figure(title, caption, _draw_curves, present))
        elif title.startswith("Offline"):
            figures.append(page.missing("The metric offline_ratio was not recorded."))
    if present := [(label, curves[name]) for name, label in LOSSES if name in curves]:
        figures.append(
            page.figure(
                "Losses by component",
                "before alpha and gamma; total is what was minimised",
                _draw_losses,
                present,
                wide=True,
            )
        )
    note = (
        "<p class=note>Across: optimizer steps over all rounds; dotted lines: a refresh. Bold: running mean; thin: each "
        "step.</p>"
    )
    return f'{note}<div class="grid">{"".join(figures)}</div>{_fed(con)}'


def _fed(con: "duckdb.DuckDBPyConnection") -> str:
    rows = _rows(con, "tokens")
    if not rows:
        return "<h3>What the optimizer was fed</h3>" + page.missing("No draws yet: `dypo train` writes them.")
    cells = [
        [
            str(r["round"]),
            page.text(r["route"]),
            page.text(r["teacher"] or "policy"),
            *(f"{r[c]:,}" for c in ("prompts", "sequences", "tokens")),
        ]
        for r in rows
    ]
    head = ("round", "route", "written by", "prompts", "sequences", "response tokens")
    return "<h3>What the optimizer was fed</h3>" + page.table(head, cells, (0, 3, 4, 5))


# ---------------------------------------------------------------- verdicts, teachers, samples
def _verdicts(con: "duckdb.DuckDBPyConnection") -> str:
    parts: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for r in _rows(con, "verifier_status"):
        part = {"trace": f"teacher {r['teacher']}", "rollout": f"rollouts, round {r['round']}"}.get(
            r["kind"], f"eval {r['suite']}, round {r['round']} step {r['step']}"
        )
        parts[r["kind"], part][r["status"]] = r["verdicts"]
    if not parts:
        return "<h3>Verifier status</h3>" + page.missing("No verdicts yet: `dypo score` writes them.")
    order = {"rollout": 0, "trace": 1, "eval": 2}
    rows, eval_rows = [], []
    for (kind, part), counts in sorted(parts.items(), key=lambda item: order[item[0][0]]):
        whole = sum(counts.values())
        ordered = {s: counts.get(s, 0) for s in STATUSES}
        share = [f"{n:,}" if n else '<span class="zero">0</span>' for n in ordered.values()]
        line = [page.text(part), f"{whole:,}", *share, _bar(ordered, STATUS_COLOUR)]
        (eval_rows if kind == "eval" else rows).append(line)
    head = [f'<i class="dot" style="background:{STATUS_COLOUR[s]}"></i>{s}' for s in STATUSES]
    heading, numbers = ("verdicts on", "all", *head, ""), range(1, 2 + len(STATUSES))
    out = "<h3>Verifier status</h3>" + (page.table(heading, rows, numbers) if rows else "")
    if eval_rows:
        out += f"<details><summary>the same for evals</summary>{page.table(heading, eval_rows, numbers)}</details>"
    return out


def _teachers(con: "duckdb.DuckDBPyConnection") -> str:
    teachers = _rows(con, "teachers")
    if not teachers:
        return "<h3>Teachers</h3>" + page.missing("No teacher traces yet: `dypo generate teachers` writes them.")
    rows = [
        [
            page.text(t["teacher"]),
            f"{t['prompts']:,}",
            f"{t['traces']:,}",
            _share(t["verified"], t["traces"]),
            _share(t["hard_covered"], t["hard_prompts"]),
            _share(t["hard_alone"], t["hard_prompts"]),
            f"{t['verified_characters']:,.0f}" if t["verified_characters"] is not None else "",
        ]
        for t in teachers
    ]
    head = (
        "teacher",
        "prompts",
        "traces",
        "verified",
        "Hard prompts covered",
        "by this one alone",
        "mean length (characters)",
    )
    note = (
        f"<p class=note>Hard prompts: the {teachers[0]['hard_prompts']:,} graded hard in any round. Covered: the teacher "
        "has a verified trace. Length: of verified traces.</p>"
    )
    return "<h3>Teachers</h3>" + page.table(head, rows, range(1, 7)) + note


def _samples(con: "duckdb.DuckDBPyConnection") -> str:
    prompts: dict[str, dict[str, list[Row]]] = {g: defaultdict(list) for g in GRADES}
    for row in _rows(con, "samples", prompts=SHOWN_PROMPTS):
        prompts[row["grade"]][row["prompt_id"]].append(row)
    if not any(prompts.values()):
        return page.missing("No graded rollouts yet: `dypo generate rollouts`, `dypo score` and `dypo grade` write them.")
    out = ["<p class=note>Of the last graded round: a right and a wrong rollout of some prompts of each grade.</p>"]
    for grade, chosen in prompts.items():
        out.append(f"<h3>{_chip(grade)}</h3>")
        if not chosen:
            out.append(page.missing(f"No prompt was {grade} in the last graded round."))
        for n, rows in enumerate(chosen.values()):
            out.append(_sample(rows, opened=n == 0))
    return "".join(out)


def _sample(rows: list[Row], opened: bool) -> str:
    r = rows[0]
    messages = "".join(
        f'<div class="said"><b>{page.text(m["role"])}</b><pre>{_clip(m["content"])}</pre></div>' for m in r["messages"]
    )
    answers = "".join(
        f'<div class="said"><b>rollout {x["sample"]}<br>{_status(x["status"])}<br><small>{x["tokens"]:,} tokens'
        f"{', extracted ' + _clip(x['extracted'], 60) if x['extracted'] is not None else ''}</small></b>"
        f"<pre>{_clip(x['text'])}</pre></div>"
        for x in rows
    )
    facts = f"{r['successes']} of {r['k']} right · gold <code>{_clip(r['answer'], 60)}</code> · {page.text(r['reason'])}"
    return (
        f"<details{' open' if opened else ''}><summary><code>{page.text(r['prompt_id'][:12])}</code> {facts}</summary>"
        f"{messages}{answers}</details>"
    )


def _status(status: str | None) -> str:
    colour = STATUS_COLOUR.get(status or "", MUTED)
    return f'<span class="status" style="color:{colour}">{page.text(status or "not scored")}</span>'


def _clip(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    rest = len(text) - limit
    return page.text(text) if rest <= 0 else f"{page.text(text[:limit])}<i>… {rest:,} more characters</i>"


# ---------------------------------------------------------------- provenance
def _provenance(con: "duckdb.DuckDBPyConnection", recipe: Recipe | None, manifests: Sequence[Manifest]) -> str:
    out = []
    uses: dict[str, list[str]] = defaultdict(list)
    for row in _rows(con, "policies"):
        uses[row["policy"]].append(row["use"])
    if uses:
        rows = [[f"<code>{page.text(p)}</code>", page.text("; ".join(u))] for p, u in uses.items()]
        out.append("<h3>Policies</h3>" + page.table(("content id", "used for"), rows))
    if manifests:
        rows = [
            [
                page.text("/".join([m.table, *(f"{k}={v}" for k, v in m.keys.items())])),
                page.text(m.stage),
                f"{m.rows:,}",
                f"{m.failed:,}",
                f"<code>{page.text(m.fingerprint[:16])}</code>",
                f"<code>{page.text(m.code)}</code>",
                page.text(m.created),
            ]
            for m in manifests
        ]
        head = ("partition", "stage", "rows", "failed", "fingerprint", "code", "written")
        versions = ", ".join(str(v) for v in sorted({m.schema_version for m in manifests}))
        inner = page.table(head, rows, (2, 3))
        summary = f"{len(manifests):,} partitions, schema version {versions}"
        opened = " open" if len(manifests) <= 24 else ""
        out.append(f"<h3>Partitions</h3><details{opened}><summary>{summary}</summary>{inner}</details>")
    else:
        out.append("<h3>Partitions</h3>" + page.missing("No manifests were given."))
    if recipe:
        shown = page.text(json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False))
        out.append(f"<h3>Recipe</h3><details><summary>as resolved</summary><pre>{shown}</pre></details>")
    return "".join(out)


# ---------------------------------------------------------------- pictures
def _draw_grades(fig: "Figure", mix: Mapping[int, Mapping[str, int]]) -> None:
    ax = fig.subplots()
    rounds = list(mix)
    base = [0.0] * len(rounds)
    for grade in reversed(GRADES):
        shares = [100 * mix[r][grade] / max(1, sum(mix[r].values())) for r in rounds]
        bars = ax.bar([str(r) for r in rounds], shares, bottom=base, color=GRADE_COLOUR[grade], label=grade, width=0.72)
        if len(rounds) <= 12:
            ax.bar_label(
                bars, [f"{s:.0f}" if s >= 6 else "" for s in shares], label_type="center", color="white", weight="bold"
            )
        base = [b + s for b, s in zip(base, shares, strict=True)]
    ax.set(xlabel="round", ylim=(0, 100), yticks=range(0, 101, 25))
    ax.set_xlim(-0.6, max(len(rounds), 4) - 0.4)
    ax.grid(axis="x", visible=False)
    if len(rounds) > 12:
        ax.set_xticks(range(0, len(rounds), -(-len(rounds) // 12)))
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=3)


def _draw_evals(fig: "Figure", evals: Mapping[tuple[str, str], list[Row]], outside: Mapping[str, bool]) -> None:
    metrics = list(
        dict.fromkeys(sorted((m for _, m in evals), key=lambda m: (m.split("@")[0], int(m.split("@")[-1] or 0))))
    )[:4]
    axes = fig.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    colours = {
        suite: LINES[i % len(LINES)]
        for i, suite in enumerate(sorted({s for s, _ in evals}, key=lambda s: (outside.get(s, False), s)))
    }
    for ax, metric in zip(axes, metrics, strict=True):
        chosen = {s: points for (s, m), points in evals.items() if m == metric}
        span = max((p["x"] for points in chosen.values() for p in points), default=1) or 1
        for i, (suite, points) in enumerate(chosen.items()):
            x = [p["x"] + (i - (len(chosen) - 1) / 2) * 0.012 * span for p in points]
            y = [100 * p["value"] for p in points]
            bars = [[100 * (p["value"] - p["ci_low"]) for p in points], [100 * (p["ci_high"] - p["value"]) for p in points]]
            line = "--" if outside.get(suite) else "-"
            ax.errorbar(
                x, y, bars, fmt="o", ls=line, color=colours[suite], capsize=3, lw=1.8, elinewidth=1.1, ms=5, label=suite
            )
        ax.set(xlabel="optimizer steps", ylim=(0, 102))
        ax.set_title(metric, loc="left", fontsize=10, color=INK)
        page.whole_ticks(ax)
    axes[0].set_ylabel("per cent right")
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(list(handles.values()), list(handles), loc="outside right upper")


def _draw_curves(fig: "Figure", series: Sequence[tuple[str, list[Row]]]) -> None:
    ax = fig.subplots()
    for i, (label, points) in enumerate(series):
        _curve(ax, points, LINES[i], label)
    ax.set_xlabel("optimizer steps")
    if len(series) > 1:
        fig.legend(loc="outside upper left", ncols=len(series))


def _draw_losses(fig: "Figure", series: Sequence[tuple[str, list[Row]]]) -> None:
    axes = fig.subplots(1, len(series), squeeze=False)[0]
    for i, (ax, (label, points)) in enumerate(zip(axes, series, strict=True)):
        _curve(ax, points, INK if label == "total" else LINES[i - 1], label)
        ax.set_title(label, loc="left", fontsize=10, color=INK)
        ax.set_xlabel("optimizer steps")


def _curve(ax: "Axes", points: list[Row], colour: str, label: str) -> None:
    """Each step thin, a centred running mean bold, the starts of later rounds as dotted lines."""
    starts: dict[int, int] = {}
    for p in points:
        starts.setdefault(p["round"], p["x"])
    x, y = page.thinned([p["x"] for p in points], [p["value"] for p in points])
    few = {"marker": "o", "ms": 4} if len(y) == 1 else {}
    ax.plot(x, y, color=colour, lw=0.8, alpha=0.45, **few)
    ax.plot(x, page.smooth(y), color=colour, lw=1.9, label=label)
    if len(starts) <= 40:
        for at in sorted(starts.values())[1:]:
            ax.axvline(at - 0.5, color="#9aa5b1", lw=0.8, ls=":")
    page.whole_ticks(ax)
