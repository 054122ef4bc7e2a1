"""Everything that a run knows about one prompt, and why it was trained on or was not.

One idea: `explain` gathers rows into one dict of JSON values, by round, and `render_explain` only draws that dict, so
`--json` and the terminal cannot disagree. Texts are models' and data sets' own: drawn with their control characters
made visible and never read as markup. Left out: token ids and per-token log-probs, which `dypo sql` shows.
"""

import difflib
import json
import re
from typing import TYPE_CHECKING, Any

from schemas.errors import UserError

if TYPE_CHECKING:
    import duckdb
    from rich.console import Group, RenderableType
    from rich.table import Table

Row = dict[str, Any]

CANDIDATES = 5
SHOWN_CHARACTERS = 600
GRADE_STYLE = {"easy": "green", "mid": "yellow", "hard": "red"}
WHY = {
    "sft": "goes to sft: Hard, with {traces} verified teacher traces, one of which is drawn at each visit",
    "rl": "goes to rl: Mid, so its whole group is trained on",
    "easy": "not trained on: every rollout is right, so there is nothing to learn",
    "no_verified_trace": "not trained on: Hard, and no teacher has a verified trace within the length limit",
    "too_long": "not trained on: prompt and response are past grade.max_tokens",
    "unjudged": "not trained on: {unjudged} of its verdicts are timeout, error or gold_bad",
    "incomplete_group": "not trained on: only {k} rollouts are there",
    "stale": "not trained on: its rollouts are of round {source_round}",
}
TAKEN = {"rl": "its whole group", "sft": "its verified traces, one of which is drawn at each visit"}
SKIPPED = {
    "sure": "only {draws} of {k} rollouts were drawn: then it was sure, with a chance of {chance:.2f}, that the whole group is {grade}",
    "unmoved": "not drawn anew but graded on the rollouts of round {source_round}: unmoved, it was {grade} there as before",
    "budget": "not drawn anew but graded on the rollouts of round {source_round}: the round's token budget did not reach it",
    "stale": "not drawn anew but graded on the rollouts of round {source_round}: the round's token budget did not reach it, and they are too old to train on",
}

PROMPT = "select prompt_id, messages, answer, verifier, source, split, metadata from prompts where prompt_id = $id"
CONTAMINATION = """
select eval_prompt_id, eval_source, words, run, overlap
from contamination
where prompt_id = $id
order by eval_prompt_id
"""
TRACES = """
select
    t.trace_id, t.teacher, t.sample, t.text, t.finish_reason, t.model, t.sampling,
    s.status, s.correct, s.extracted, s.detail
from traces as t
left join scores as s on s.kind = 'trace' and s.id = t.trace_id
where t.prompt_id = $id
order by t.teacher, t.sample
"""
FAILURES = """
select stage, round, step, suite, teacher, sample, why
from failures
where prompt_id = $id
order by stage, round, step, suite, teacher, sample
"""
GRADES = """
select round, source_round, policy, k, successes, unjudged, grade, traces, reason
from grades
where prompt_id = $id
order by round
"""
SKIPS = """
select round, source_round, draws, skipped, grade, chance, why
from skips
where prompt_id = $id
order by round
"""
ROLLOUTS = """
select
    r.round, r.rollout_id, r.sample, r.policy, r.text, r.finish_reason, r.engine, r.temperature, r.seed,
    len(r.tokens) as tokens, list_avg(r.logprobs) as mean_logprob,
    s.status, s.reward, s.correct, s.extracted, s.detail, s.elapsed_ms
from rollouts as r
left join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
where r.prompt_id = $id
order by r.round, r.sample
"""
SHARDS = """
select
    round, source_round, route, item_id, sample, teacher, len(tokens) as tokens, reward, correct, advantage, group_size,
    w_sft, w_grpo, w_gal
from shards
where prompt_id = $id
order by round, route, teacher, source_round, sample
"""
DRAWS = """
select round, step, position, item_id, route, teacher, age, log_ratio, kl, clip_fraction
from draws
where prompt_id = $id
order by round, step, position
"""
EVALS = """
select r.suite, r.round, r.step, r.sample, r.rollout_id, r.text, r.finish_reason, s.status, s.correct, s.extracted, s.detail
from eval_rollouts as r
left join scores as s on s.kind = 'eval' and s.id = r.rollout_id
where r.prompt_id = $id
order by r.suite, r.round, r.step, r.sample
"""


def explain(con: "duckdb.DuckDBPyConnection", prompt_id: str) -> dict[str, Any]:
    """All rows of one prompt as JSON values. `prompt_id` may be a prefix that only one prompt has, else UserError."""
    found = _find(con, prompt_id)
    (prompt,) = _rows(con, PROMPT, found)
    prompt["metadata"] = json.loads(prompt["metadata"]) if prompt["metadata"] else None
    traces = _rows(con, TRACES, found)
    for trace in traces:
        trace["sampling"] = json.loads(trace["sampling"])
    rounds: dict[int, Row] = {}
    for key, query in (("grade", GRADES), ("skip", SKIPS), ("rollouts", ROLLOUTS), ("shards", SHARDS), ("draws", DRAWS)):
        for row in _rows(con, query, found):
            number = row.pop("round")
            at = rounds.setdefault(
                number, {"round": number, "grade": None, "skip": None, "rollouts": [], "shards": [], "draws": []}
            )
            if key in ("grade", "skip"):
                at[key] = row
            else:
                at[key].append(row)
    for at in rounds.values():
        at["why"] = _why(at)
    return {
        "prompt": prompt,
        "contamination": _rows(con, CONTAMINATION, found),
        "traces": traces,
        "failures": _rows(con, FAILURES, found),
        "rounds": [rounds[r] for r in sorted(rounds)],
        "evals": _rows(con, EVALS, found),
        "why": _summary(con, prompt, rounds),
    }


def _rows(con: "duckdb.DuckDBPyConnection", query: str, prompt_id: str) -> list[Row]:
    result = con.execute(query, {"id": prompt_id})
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def _find(con: "duckdb.DuckDBPyConnection", wanted: str) -> str:
    """The one prompt id that begins with `wanted`; UserError with the nearest candidates otherwise."""
    wanted = wanted.strip().lower()
    if not wanted:
        raise UserError("PROMPT_ID: expected a prompt id or the beginning of one, found an empty text")
    query = (
        "select prompt_id, messages[-1].content from prompts where starts_with(prompt_id, $p) order by prompt_id limit $n"
    )
    found = con.execute(query, {"p": wanted, "n": CANDIDATES + 1}).fetchall()
    if len(found) == 1 or any(id_ == wanted for id_, _ in found):
        return wanted if len(found) != 1 else found[0][0]
    if found:
        more = "\n  ..." if len(found) > CANDIDATES else ""
        raise UserError(
            f"PROMPT_ID '{wanted}': several prompts begin so; give more of the id\n{_listed(found[:CANDIDATES])}{more}"
        )
    known = con.execute("select prompt_id, messages[-1].content from prompts order by prompt_id").fetchall()
    if not known:
        raise UserError(f"PROMPT_ID '{wanted}': the table prompts is empty; run `dypo ingest` first")
    raise UserError(
        f"PROMPT_ID '{wanted}': no prompt begins so. Nearest of {len(known):,}:\n{_listed(_nearest(wanted, known))}\n"
        'Ids: dypo sql RUN "select prompt_id, messages[-1].content from prompts"'
    )


def _nearest(wanted: str, known: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The ids that share the longest beginning with `wanted`, ties by similarity (over the best few hundred)."""

    def shared(id_: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(id_, wanted, strict=False)) if a != b), min(len(id_), len(wanted)))

    ranked = sorted(known, key=lambda row: (-shared(row[0]), row[0]))[:300]
    ranked.sort(key=lambda row: (-shared(row[0]), -difflib.SequenceMatcher(None, row[0], wanted).ratio(), row[0]))
    return ranked[:CANDIDATES]


def _listed(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {id_}  {_visible(' '.join(content.split()))[:60]}" for id_, content in rows)


def _why(at: Row) -> str:
    """One sentence on what happened to the prompt in a round, and where its group was not drawn whole, why that was."""
    return "; ".join(filter(None, [_graded(at), _skipped(at["skip"])]))


def _skipped(skip: Row | None) -> str:
    if skip is None:
        return ""
    why = SKIPPED[skip["why"]].format(**skip, k=skip["draws"] + skip["skipped"])
    if skip["why"] == "sure" or skip["chance"] is None:
        return why
    return f"{why}; that group was not drawn to its end, {skip['grade']} with a chance of {skip['chance']:.2f}"


def _graded(at: Row) -> str:
    grade, steps = at["grade"], sorted({d["step"] for d in at["draws"]})
    routes = sorted({row["route"] for row in at["shards"]})
    taken = "the run's method takes " + " and ".join(TAKEN[route] for route in routes)
    if grade is None and routes:
        return f"without rollouts in this round, so not graded: {taken}" + ("; drawn in " + _steps(steps) if steps else "")
    if grade is None:
        return "not graded in this round" + (": score and grade its rollouts" if at["rollouts"] else "")
    why = WHY[grade["reason"]].format(**grade) if grade["reason"] in WHY else f"reason {grade['reason']}"
    if routes and routes != [grade["reason"]]:  # DYPO's gates are the reasons; another method has its own
        why = f"{grade['grade']}: {taken}"
    if routes or grade["reason"] in ("sft", "rl"):
        if not at["shards"]:
            why += "; the method's routing took it in no shard"
        elif steps:
            why += "; drawn in " + _steps(steps)
        else:
            why += "; in the shards, but drawn in no step so far"
    return why


def _steps(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:12])) + (", ..." if len(steps) > 12 else "")
    return f"step{'s' if len(steps) > 1 else ''} {shown}"


def _summary(con: "duckdb.DuckDBPyConnection", prompt: Row, rounds: dict[int, Row]) -> str:
    """One sentence on the prompt over the whole run."""
    if prompt["split"] == "eval":
        return "an eval prompt: it never reaches rollouts, grades or training"
    if prompt["split"] == "contaminated":
        return "dropped from training: it shares text with an eval prompt"
    if not rounds:
        others = con.execute("select count(distinct prompt_id) from rollouts").fetchall()[0][0]
        return "no rollouts yet" + (f": the rounds so far drew {others:,} other prompts" if others else "")
    graded = [f"{at['grade']['grade']} (round {r})" for r, at in sorted(rounds.items()) if at["grade"]]
    drawn = sum(len({d["step"] for d in at["draws"]}) for at in rounds.values())
    return f"{' -> '.join(graded) or 'not graded yet'}; in {drawn} optimizer step{'' if drawn == 1 else 's'}"


# ---------------------------------------------------------------- drawing
def render_explain(d: dict[str, Any]) -> "Group":
    """The dict of `explain` for a terminal; print it with `rich.console.Console`."""
    from rich.console import Group
    from rich.text import Text

    p = d["prompt"]
    head = Text.assemble(("prompt ", "bold"), p["prompt_id"], "   ", (_visible(d["why"]), "bold"))
    facts = f"source {p['source']}   split {p['split']}   verifier {p['verifier']}   gold {p['answer']}"
    parts: list[RenderableType] = [head, Text(_visible(facts), style="dim")]
    parts += [Text.assemble((f"{m['role']}: ", "cyan"), _clip(m["content"])) for m in p["messages"]]
    if d["contamination"]:
        table = _table("shares text with", "eval prompt", "source", "words", "overlap", "text")
        for c in d["contamination"]:
            _add(table, c["eval_prompt_id"][:8], c["eval_source"], c["words"], f"{c['overlap']:.2f}", c["run"])
        parts += [Text(), table]
    if d["traces"]:
        table = _table("teacher traces", "teacher", "sample", "verdict", "extracted", "text")
        for t in d["traces"]:
            _add(table, t["teacher"], t["sample"], _verdict(t), t["extracted"], t["text"])
        parts += [Text(), table]
    if d["failures"]:
        table = _table("could not be had", "stage", "round", "teacher", "sample", "text")
        for f in d["failures"]:
            _add(table, f["stage"], f["round"], f["teacher"], f["sample"], f["why"])
        parts += [Text(), table]
    for at in d["rounds"]:
        parts += [Text(), *_round_parts(at)]
    if d["evals"]:
        table = _table("evals", "suite", "round", "step", "sample", "verdict", "extracted", "text")
        for e in d["evals"]:
            _add(table, e["suite"], e["round"], e["step"], e["sample"], _verdict(e), e["extracted"], e["text"])
        parts += [Text(), table]
    return Group(*parts)


def _round_parts(at: Row) -> "list[RenderableType]":
    from rich.text import Text

    g = at["grade"]
    line = Text.assemble((f"round {at['round']}  ", "bold"))
    if g:
        line.append(g["grade"], style=f"bold {GRADE_STYLE.get(g['grade'], '')}")
        line.append(f"  {g['successes']} of {g['k']} right  ")
    line.append(_visible(at["why"]))
    parts: list[RenderableType] = [line]
    if at["rollouts"]:
        table = _table("", "rollout", "sample", "verdict", "reward", "extracted", "tokens", "mean log-prob", "text")
        for r in at["rollouts"]:
            reward = "" if r["reward"] is None else f"{r['reward']:g}"
            mean = "" if r["mean_logprob"] is None else f"{r['mean_logprob']:.3f}"
            _add(table, r["rollout_id"][:8], r["sample"], _verdict(r), reward, r["extracted"], r["tokens"], mean, r["text"])
        parts.append(table)
    if at["shards"]:
        table = _table(
            "",
            "shard row",
            "route",
            "teacher",
            "sample",
            "advantage",
            "w_sft",
            "w_grpo",
            "w_gal",
            "last log-ratio",
            "drawn in",
        )
        for s in at["shards"]:
            mine = [d for d in at["draws"] if d["item_id"] == s["item_id"]]
            steps = sorted({d["step"] for d in mine})
            moved = f"{mine[-1]['log_ratio']:+.4f}" if mine and mine[-1]["log_ratio"] is not None else ""
            weights = [f"{s[w]:g}" for w in ("w_sft", "w_grpo", "w_gal")]
            drawn = _steps(steps) if steps else "no step"
            _add(
                table,
                s["item_id"][:8],
                s["route"],
                s["teacher"],
                s["sample"],
                f"{s['advantage']:+.3f}",
                *weights,
                moved,
                drawn,
            )
        parts.append(table)
    return parts


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", ratio=1 if name == "text" else None, no_wrap=name != "text")
    return table


def _add(table: "Table", *cells: object) -> None:
    from rich.text import Text

    table.add_row(*(Text("" if c is None else _clip(str(c))) for c in cells))


def _verdict(row: Row) -> str:
    return (row["status"] or "not scored") + (f" ({row['detail']})" if row["detail"] else "")


def _clip(text: str) -> str:
    rest = len(text) - SHOWN_CHARACTERS
    return _visible(text) if rest <= 0 else f"{_visible(text[:SHOWN_CHARACTERS])}... ({rest:,} more characters)"


def _visible(text: str) -> str:
    """Control characters (terminal escapes among them) as their visible pictures; line ends and tabs stay."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]",
        lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else "\N{SYMBOL FOR DELETE}",
        text,
    )
