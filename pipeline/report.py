"""The report: one HTML file that shows what a run did, with no script, no network and nothing to install.

One idea: every number comes from a query in sql/report/ over the run's own tables, so whatever the page says can be
asked again with `dypo sql`. Same tables, same bytes: nothing on the page is a date or a random id of its own.

Whatever a model, a teacher or a data set wrote is hostile until escaped: all of it goes through `_text`, and the page's
Content-Security-Policy forbids scripts and requests besides. A table without rows gives a sentence, never an error.
Left out: anything that moves. For zooming and slicing there is SQL.
"""

import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
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
LINES = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#97266d", "#4a5568")
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
MAX_POINTS = 400


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
    nav = "".join(f'<a href="#{a}">{_text(t)}</a>' for a, (t, _) in zip(anchors, sections, strict=True))
    body = "".join(
        f'<section id="{a}"><h2>{_text(t)}</h2>{s}</section>' for a, (t, s) in zip(anchors, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)} · dypo report</title><style>{CSS}</style></head>\n"
        f"<body><header><h1>{_text(name)}</h1><p>{_subtitle(recipe)}</p><nav>{nav}</nav></header>\n<main>"
        f"{_headline(con, recipe)}{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------- small pieces
def _rows(con: "duckdb.DuckDBPyConnection", query: str, **parameters: Any) -> list[Row]:
    """All rows of sql/report/QUERY.sql, drained, so the connection is free for whoever uses it next."""
    sql = (Path(__file__).parent / "sql" / "report" / f"{query}.sql").read_text(encoding="utf-8")
    result = con.execute(sql, parameters) if parameters else con.execute(sql)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def _text(value: object) -> str:
    """Any value as HTML text; control characters become their visible pictures (U+2400 on)."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda m: "␡" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), str(value))
    return html.escape(visible)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part / whole, 0)})" if whole else "0"


def _interval(low: float, high: float) -> str:
    return f'<span class="ci">{100 * low:.1f} to {100 * high:.1f}</span>'


def _missing(what: str) -> str:
    """A sentence in place of a table or picture without rows; commands in backticks."""
    said = re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(what))
    return f'<p class="missing">{said}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """An HTML table of cells that are HTML already; columns in `numbers` are right-aligned."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{c}</{tag}>" for i, c in enumerate(row))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{lines}</tbody></table></div>'


def _chip(grade: str) -> str:
    return f'<span class="chip" style="background:{GRADE_COLOUR.get(grade, MUTED)}">{_text(grade)}</span>'


def _bar(parts: Mapping[str, int], colours: Mapping[str, str]) -> str:
    """A stacked bar of one line; the title of each piece says its name and count."""
    whole = sum(parts.values()) or 1
    pieces = "".join(
        f'<i style="width:{100 * n / whole:.2f}%;background:{colours[key]}" title="{_text(key)}: {n}"></i>'
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
    return " · ".join(_text(f) for f in facts)


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
        f'<div class="card"><b>{_text(title)}</b><strong>{_text(figure)}</strong><span>{note}</span></div>'
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
        return _missing("No evals yet: `dypo eval` writes them.")
    problems = defaultdict(dict)
    for row in _rows(con, "eval_problems"):
        problems[row["suite"], row["round"], row["step"]][row["prompt_id"]] = (row["samples"], row["correct"])
    outside = _outside(recipe)

    def one(points: list[Row]) -> list[str]:
        first, last = points[0], points[-1]
        suite, metric = first["suite"], first["metric"]
        kind = {True: "out of distribution", False: "in distribution", None: ""}[outside.get(suite)]
        cells = [_text(suite), kind, _text(metric), f"{last['problems']:,}"]
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
    picture = _figure(
        "Evals by checkpoint",
        "95 % intervals over problems; dashed: out of distribution",
        _draw_evals,
        evals,
        outside,
        wide=True,
    )
    return _table(head, rows, (3, 4, 6, 8)) + note + picture


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
        return _missing("No grades yet: `dypo grade` writes them.")
    table = []
    for r, parts in mix.items():
        whole = sum(parts.values())
        table.append([str(r), f"{whole:,}", *(_share(parts[g], whole) for g in GRADES), _bar(parts, GRADE_COLOUR)])
    grades = _table(("round", "prompts", *(_chip(g) for g in GRADES), ""), table, range(5))
    picture = _figure("Grade shares by round", "per cent of the prompts graded in the round", _draw_grades, mix)
    return f'<div class="grid">{picture}<div>{grades}{_transitions(con)}</div></div>{_reasons(con)}'


def _reasons(con: "duckdb.DuckDBPyConnection") -> str:
    counts = _by_round(_rows(con, "reasons"), "reason")
    found = {r for parts in counts.values() for r in parts}
    seen = [r for r in REASONS if r in found] + sorted(found - set(REASONS))  # a grading query of the user's may add some
    rounds = sorted(counts)[-6:]
    rows = [
        [
            f"<code>{_text(r)}</code>",
            *(f"{counts[n].get(r, 0):,}" for n in rounds),
            f'<span class="ci">{_text(REASON_MEANING.get(r, ""))}</span>',
        ]
        for r in seen
    ]
    return "<h3>Where prompts go by DYPO's gates, and why not</h3>" + _table(
        ("reason", *(f"round {n}" for n in rounds), ""), rows, range(1, len(rounds) + 1)
    )


def _transitions(con: "duckdb.DuckDBPyConnection") -> str:
    pairs: dict[tuple[int, int], dict[tuple[str, str], int]] = defaultdict(dict)
    for row in _rows(con, "transitions"):
        pairs[row["from_round"], row["to_round"]][row["from_grade"], row["to_grade"]] = row["prompts"]
    if not pairs:
        return "<h3>Grade transitions</h3>" + _missing("No prompt has been graded in two rounds yet.")
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
        return _missing("No training metrics yet: `dypo train` writes them.") + _fed(con)
    figures = []
    for title, caption, series in PANELS:
        if present := [(label, curves[name]) for name, label in series if name in curves]:
            figures.append(_figure(title, caption, _draw_curves, present))
        elif title.startswith("Offline"):
            figures.append(_missing("The metric offline_ratio was not recorded."))
    if present := [(label, curves[name]) for name, label in LOSSES if name in curves]:
        figures.append(
            _figure(
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
        return "<h3>What the optimizer was fed</h3>" + _missing("No draws yet: `dypo train` writes them.")
    cells = [
        [
            str(r["round"]),
            _text(r["route"]),
            _text(r["teacher"] or "policy"),
            *(f"{r[c]:,}" for c in ("prompts", "sequences", "tokens")),
        ]
        for r in rows
    ]
    head = ("round", "route", "written by", "prompts", "sequences", "response tokens")
    return "<h3>What the optimizer was fed</h3>" + _table(head, cells, (0, 3, 4, 5))


# ---------------------------------------------------------------- verdicts, teachers, samples
def _verdicts(con: "duckdb.DuckDBPyConnection") -> str:
    parts: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for r in _rows(con, "verifier_status"):
        part = {"trace": f"teacher {r['teacher']}", "rollout": f"rollouts, round {r['round']}"}.get(
            r["kind"], f"eval {r['suite']}, round {r['round']} step {r['step']}"
        )
        parts[r["kind"], part][r["status"]] = r["verdicts"]
    if not parts:
        return "<h3>Verifier status</h3>" + _missing("No verdicts yet: `dypo score` writes them.")
    order = {"rollout": 0, "trace": 1, "eval": 2}
    rows, eval_rows = [], []
    for (kind, part), counts in sorted(parts.items(), key=lambda item: order[item[0][0]]):
        whole = sum(counts.values())
        ordered = {s: counts.get(s, 0) for s in STATUSES}
        share = [f"{n:,}" if n else '<span class="zero">0</span>' for n in ordered.values()]
        line = [_text(part), f"{whole:,}", *share, _bar(ordered, STATUS_COLOUR)]
        (eval_rows if kind == "eval" else rows).append(line)
    head = [f'<i class="dot" style="background:{STATUS_COLOUR[s]}"></i>{s}' for s in STATUSES]
    heading, numbers = ("verdicts on", "all", *head, ""), range(1, 2 + len(STATUSES))
    out = "<h3>Verifier status</h3>" + (_table(heading, rows, numbers) if rows else "")
    if eval_rows:
        out += f"<details><summary>the same for evals</summary>{_table(heading, eval_rows, numbers)}</details>"
    return out


def _teachers(con: "duckdb.DuckDBPyConnection") -> str:
    teachers = _rows(con, "teachers")
    if not teachers:
        return "<h3>Teachers</h3>" + _missing("No teacher traces yet: `dypo generate teachers` writes them.")
    rows = [
        [
            _text(t["teacher"]),
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
    return "<h3>Teachers</h3>" + _table(head, rows, range(1, 7)) + note


def _samples(con: "duckdb.DuckDBPyConnection") -> str:
    prompts: dict[str, dict[str, list[Row]]] = {g: defaultdict(list) for g in GRADES}
    for row in _rows(con, "samples", prompts=SHOWN_PROMPTS):
        prompts[row["grade"]][row["prompt_id"]].append(row)
    if not any(prompts.values()):
        return _missing("No graded rollouts yet: `dypo generate rollouts`, `dypo score` and `dypo grade` write them.")
    out = ["<p class=note>Of the last graded round: a right and a wrong rollout of some prompts of each grade.</p>"]
    for grade, chosen in prompts.items():
        out.append(f"<h3>{_chip(grade)}</h3>")
        if not chosen:
            out.append(_missing(f"No prompt was {grade} in the last graded round."))
        for n, rows in enumerate(chosen.values()):
            out.append(_sample(rows, opened=n == 0))
    return "".join(out)


def _sample(rows: list[Row], opened: bool) -> str:
    r = rows[0]
    messages = "".join(
        f'<div class="said"><b>{_text(m["role"])}</b><pre>{_clip(m["content"])}</pre></div>' for m in r["messages"]
    )
    answers = "".join(
        f'<div class="said"><b>rollout {x["sample"]}<br>{_status(x["status"])}<br><small>{x["tokens"]:,} tokens'
        f"{', extracted ' + _clip(x['extracted'], 60) if x['extracted'] is not None else ''}</small></b>"
        f"<pre>{_clip(x['text'])}</pre></div>"
        for x in rows
    )
    facts = f"{r['successes']} of {r['k']} right · gold <code>{_clip(r['answer'], 60)}</code> · {_text(r['reason'])}"
    return (
        f"<details{' open' if opened else ''}><summary><code>{_text(r['prompt_id'][:12])}</code> {facts}</summary>"
        f"{messages}{answers}</details>"
    )


def _status(status: str | None) -> str:
    colour = STATUS_COLOUR.get(status or "", MUTED)
    return f'<span class="status" style="color:{colour}">{_text(status or "not scored")}</span>'


def _clip(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    rest = len(text) - limit
    return _text(text) if rest <= 0 else f"{_text(text[:limit])}<i>… {rest:,} more characters</i>"


# ---------------------------------------------------------------- provenance
def _provenance(con: "duckdb.DuckDBPyConnection", recipe: Recipe | None, manifests: Sequence[Manifest]) -> str:
    out = []
    uses: dict[str, list[str]] = defaultdict(list)
    for row in _rows(con, "policies"):
        uses[row["policy"]].append(row["use"])
    if uses:
        rows = [[f"<code>{_text(p)}</code>", _text("; ".join(u))] for p, u in uses.items()]
        out.append("<h3>Policies</h3>" + _table(("content id", "used for"), rows))
    if manifests:
        rows = [
            [
                _text("/".join([m.table, *(f"{k}={v}" for k, v in m.keys.items())])),
                _text(m.stage),
                f"{m.rows:,}",
                f"{m.failed:,}",
                f"<code>{_text(m.fingerprint[:16])}</code>",
                f"<code>{_text(m.code)}</code>",
                _text(m.created),
            ]
            for m in manifests
        ]
        head = ("partition", "stage", "rows", "failed", "fingerprint", "code", "written")
        versions = ", ".join(str(v) for v in sorted({m.schema_version for m in manifests}))
        inner = _table(head, rows, (2, 3))
        summary = f"{len(manifests):,} partitions, schema version {versions}"
        opened = " open" if len(manifests) <= 24 else ""
        out.append(f"<h3>Partitions</h3><details{opened}><summary>{summary}</summary>{inner}</details>")
    else:
        out.append("<h3>Partitions</h3>" + _missing("No manifests were given."))
    if recipe:
        shown = _text(json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False))
        out.append(f"<h3>Recipe</h3><details><summary>as resolved</summary><pre>{shown}</pre></details>")
    return "".join(out)


# ---------------------------------------------------------------- pictures
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dypo",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def _figure(title: str, caption: str, draw: Callable[..., None], *args: Any, wide: bool = False) -> str:
    """One picture as inline SVG in a <figure>. `draw` gets an empty matplotlib figure and the rest of the arguments."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        fig = Figure(figsize=(10.6, 3.3) if wide else (5.2, 2.9), layout="constrained")
        draw(fig, *args)
        svg = _inline(fig, re.sub(r"\W+", "-", title.lower()))
    size = ' class="wide"' if wide else ""
    label = _text(f"{title}: {caption}")
    return (
        f"<figure{size}><figcaption><b>{_text(title)}</b> <span>{_text(caption)}</span></figcaption>"
        f'<div role="img" aria-label="{label}">{svg}</div></figure>'
    )


def _inline(fig: "Figure", prefix: str) -> str:
    """The figure as an <svg> element for a page that holds several: its ids prefixed, and no address of any kind in it."""
    import io

    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id|href)="(#?)([^"]+)"', rf'\1="\2{prefix}-\3"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg))


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
        _whole_ticks(ax)
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
    x, y = _thinned([p["x"] for p in points], [p["value"] for p in points])
    reach = len(y) // 24
    smooth = [sum(w) / len(w) for i in range(len(y)) if (w := y[max(0, i - reach) : i + reach + 1])]
    few = {"marker": "o", "ms": 4} if len(y) == 1 else {}
    ax.plot(x, y, color=colour, lw=0.8, alpha=0.45, **few)
    ax.plot(x, smooth, color=colour, lw=1.9, label=label)
    if len(starts) <= 40:
        for at in sorted(starts.values())[1:]:
            ax.axvline(at - 0.5, color="#9aa5b1", lw=0.8, ls=":")
    _whole_ticks(ax)


def _whole_ticks(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _thinned(x: list[int], y: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means over runs of neighbours, so a long run's page stays small."""
    size = -(-len(x) // MAX_POINTS)
    runs = range(0, len(x), size)
    return (
        [sum(r) / len(r) for i in runs if (r := x[i : i + size])],
        [sum(r) / len(r) for i in runs if (r := y[i : i + size])],
    )


CSS = f"""
:root {{ color-scheme: light; --ink: {INK}; --muted: {MUTED}; --line: {GRID};
  --sans: system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif;
  --mono: ui-monospace, "SFMono-Regular", "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 var(--sans); }}
header, main {{ max-width: 1120px; margin: 0 auto; padding: 0 28px; }}
header {{ padding-top: 32px; }}
h1 {{ margin: 0; font-size: 30px; letter-spacing: -.01em; }}
header p {{ margin: 4px 0 14px; color: var(--muted); }}
nav {{ display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 10px 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }}
nav a {{ color: #2b6cb0; text-decoration: none; }}
nav a:hover {{ text-decoration: underline; }}
section {{ margin: 40px 0; }}
h2 {{ margin: 0 0 14px; font-size: 21px; }}
h3 {{ margin: 26px 0 8px; font-size: 15.5px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; margin-top: 22px; }}
.card {{ border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; display: flex; flex-direction: column; }}
.card b {{ font-weight: 500; font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }}
.card strong {{ font-size: 21px; font-weight: 650; line-height: 1.4; font-variant-numeric: tabular-nums; }}
.card > span {{ font-size: 13px; color: var(--muted); }}
.grid {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px 28px; align-items: start; }}
.row {{ display: flex; flex-wrap: wrap; gap: 18px 34px; }}
figure {{ margin: 0; min-width: 0; }}
.wide {{ grid-column: 1 / -1; margin-top: 18px; }}
figcaption {{ font-size: 14px; margin-bottom: 4px; }}
figcaption span {{ color: var(--muted); font-size: 13px; margin-left: 4px; }}
figure svg {{ width: 100%; height: auto; display: block; }}
figure svg text {{ font-family: var(--sans) !important; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }}
th {{ text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1.5px solid #cbd2d9; white-space: nowrap; }}
th, td {{ padding: 5px 10px 5px 0; vertical-align: baseline; }}
td {{ border-bottom: 1px solid var(--line); }}
th.n, td.n {{ text-align: right; padding-right: 18px; white-space: nowrap; }}
.ci {{ color: var(--muted); font-size: 12.5px; }}
.zero {{ color: #b8c1cb; }}
.note {{ color: var(--muted); font-size: 13px; margin: 6px 0 14px; max-width: 110ch; }}
.missing {{ color: var(--muted); background: #f7f9fa; border-radius: 6px; padding: 10px 14px; margin: 8px 0; }}
.chip {{ color: #fff; border-radius: 4px; padding: 1px 8px; font-size: 12px; font-weight: 600; }}
.status {{ font-weight: 650; }}
.dot {{ display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }}
.bar {{ display: flex; width: 100%; min-width: 110px; height: 10px; border-radius: 3px; overflow: hidden; }}
.bar i {{ display: block; height: 100%; }}
.card .bar {{ margin-top: 7px; }}
.moves {{ width: auto; }}
.moves caption {{ text-align: left; color: var(--muted); font-size: 13px; padding-bottom: 4px; }}
.moves th {{ border: 0; padding: 4px 8px 4px 0; text-align: center; }}
.moves td {{ text-align: center; min-width: 76px; padding: 7px 8px; border: 2px solid #fff; font-weight: 600; }}
.moves small {{ display: block; font-weight: 400; color: var(--muted); font-size: 11.5px; line-height: 1.2; }}
details {{ border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 0 14px; }}
summary {{ cursor: pointer; padding: 9px 0; font-size: 13.5px; overflow-wrap: anywhere; }}
.said {{ display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 14px; padding: 8px 0;
  border-top: 1px solid var(--line); }}
.said b {{ font-size: 12.5px; font-weight: 500; color: var(--muted); overflow-wrap: anywhere; }}
code, pre {{ font: 12.5px/1.5 var(--mono); }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; }}
pre i {{ color: var(--muted); }}
@media (max-width: 760px) {{ .grid, .said {{ grid-template-columns: minmax(0, 1fr); }} }}
@media print {{ nav {{ display: none; }} figure, .said {{ break-inside: avoid-page; }} }}
"""
