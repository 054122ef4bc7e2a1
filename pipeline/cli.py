"""The command `dypo`: parses, calls a stage, prints what it did. No other logic, and no heavy import at the top.

Exit codes: 0 done; 2 refused before work (usage, recipe, data); 1 work began and failed; 130 interrupted.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.interrupts import Interrupts
from schemas.errors import INTERRUPTED, DypoError, Reported, UserError, WorkError

if TYPE_CHECKING:
    from pipeline.context import Context
    from pipeline.rescore import Rescored
    from pipeline.stage import Outcome
    from pipeline.what_if import WhatIf

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DYPO, offline first: generate, score, grade, train. Every rollout is a row of Parquet that SQL can ask about.",
)

audit_app = typer.Typer(no_args_is_help=True, help="Check what is stored against what is computed again.")
app.add_typer(audit_app, name="audit")

Target = Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="a recipe (.toml) or a run folder")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="the refresh round; default: the newest that fits")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key, for example train.method.alpha=0.3"),
]
Regenerate = Annotated[
    bool, typer.Option("--regenerate", help="allow making again what is expensive; the old rows move to superseded/")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line on standard output")]


def main() -> None:
    """Entry point: turns errors of ours into one clear message and the promised exit code."""
    from pipeline.study.tied import end_with_starter

    end_with_starter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interrupts = Interrupts()
    code = 0
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # typer turns Ctrl-C into this return value
            code = INTERRUPTED
    except typer.Exit as e:
        code = e.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as e:
        if interrupts.recent():
            code = INTERRUPTED
        elif isinstance(e, DypoError):
            if not isinstance(e, Reported):
                _say(e)
            code = e.exit_code
        elif hasattr(e, "exit_code") and hasattr(e, "format_message"):  # a usage error of the command line
            e.show() if hasattr(e, "show") else print(e, file=sys.stderr)  # type: ignore[attr-defined]
            code = 2
        else:
            raise
    if code == INTERRUPTED and _launcher() is None:
        print("interrupted: finished rows are kept; the same command goes on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code == 0 and "duckdb" in sys.modules else sys.exit(code)


def _say(e: DypoError) -> None:
    """On stderr; a rank says it to the process that started it, so that what all ranks found is said once."""
    if told := _launcher():
        Path(told).write_text(json.dumps({"message": str(e), "timestamp": int(time.time()), "exit_code": e.exit_code}))
    else:
        print(f"error: {e}", file=sys.stderr)


def _launcher() -> str | None:
    """Where a rank that trainer/launch.py started leaves what it has to say; None for any other process."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE") if "DYPO_LAUNCHER" in os.environ else None


@contextmanager
def _writing(target: Path, overrides: list[str] | None) -> "Iterator[Context]":
    """A run to write to: recipe parsed, folder locked, recipe saved before anything runs.

    A run's recipe is not changed to one whose files are missing, whatever the stage reads of it.
    """
    from pipeline.context import load, resolved
    from pipeline.flow import refuse_missing_files
    from pipeline.store import lock, publish

    ctx = load(target, overrides)
    path = ctx.run / "recipe.toml"
    with lock(ctx.run):
        before = path.read_text() if path.exists() else None
        if before != (text := resolved(ctx)):
            if before is not None:  # else the stages say what they need: problems can be read in before there is a model
                refuse_missing_files(ctx)
            publish(path, lambda p: p.write_text(text))
        try:
            yield ctx
        except UserError:  # refused: what was set stays out of the run
            if before is not None:
                publish(path, lambda p: p.write_text(before))
            raise


def _tell(outcomes: "Iterable[Outcome]", as_json: bool) -> None:
    """Prints each outcome as it comes."""
    for o in outcomes:
        if as_json:
            print(json.dumps(vars(o)), flush=True)
        else:
            facts = ", ".join(f"{k} {_short(v)}" for k, v in o.facts.items() if k not in ("rows_per_s", "policy"))
            what = f"nothing to do ({o.why})" if o.action == "nothing" else f"{o.action} {o.rows} rows"
            if o.action == "added":
                what = f"added {o.added} rows ({o.rows} in all)"
            if o.stage == "train" and o.action != "nothing":
                what = "done"
            failed = f", {o.failed} failed" if o.failed else ""
            time = f" in {o.seconds:.1f} s" if o.seconds else ""
            print(f"{o.partition}: {what}{failed}{time}{'  ' + facts if facts else ''}", flush=True)


def _short(v: Any) -> str:
    return " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v)


def _reference(ctx: "Context") -> Any:
    """folder -> the trainer's own forward of that policy, which checks a vllm engine before it samples.

    None for hf, which is that forward. Loaded at the first call, on the CPU: a GPU is the engine's.
    """
    if ctx.recipe.rollouts.engine.type == "hf":
        return None
    from trainer import api

    def of(folder: Path) -> Any:
        model: list[Any] = []

        def logprobs(prompt_tokens: list[int], tokens: list[int], temperature: float) -> list[float]:
            if not model:
                model.append(api.load_model(folder, ctx.recipe.policy.model_copy(update={"device": "cpu"})))
            return api.sequence_logprobs(model[0], prompt_tokens, tokens, temperature)

        return logprobs

    return of


# ---------------------------------------------------------------- stages
@app.command()
def ingest(target: Target, set: Set = None, as_json: Json = False) -> None:
    """Read problems into RUN/prompts; check every row and gold answer first."""
    from pipeline.stages import ingest as stage

    with _writing(target, set) as ctx:
        _tell([stage.run(ctx)], as_json)


@app.command()
def generate(
    what_or_target: Annotated[
        str, typer.Argument(metavar="[teachers|rollouts] RECIPE|RUN", help="leave the word out for both")
    ],
    target: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    round: Round = None,
    set: Set = None,
    regenerate: Regenerate = False,
    as_json: Json = False,
) -> None:
    """Write teacher traces, then k rollouts a prompt from the current policy."""
    from pipeline.stages import generate as stage

    what = what_or_target if target is not None else "both"
    if what not in ("teachers", "rollouts", "both"):
        raise UserError(f"generate {what}: expected teachers or rollouts")
    with _writing(target or Path(what_or_target), set) as ctx:
        if what != "rollouts":
            _tell(stage.teachers(ctx, regenerate=regenerate), as_json)
        if what != "teachers":
            r = ctx.next_round() if round is None else round
            _tell(stage.rollouts(ctx, r, regenerate=regenerate, reference=_reference(ctx)), as_json)


@app.command()
def score(
    target: Target,
    round: Round = None,
    set: Set = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="leave scores and grades as they are: judge beside them, show what differs from the verdicts of that version",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge the round's rollouts and every teacher's traces."""
    from pipeline.flow import score_round

    if against is not None:
        from pipeline.rescore import against as rescore

        return _show_rescored(rescore(target, set or [], round, against), target, set or [], as_json)
    with _writing(target, set) as ctx:
        _tell(score_round(ctx, ctx.newest_round() if round is None else round, again=True), as_json)


@app.command()
def grade(
    target: Target,
    round: Round = None,
    set: Set = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="KEY=VALUE",
            help="write nothing: show what would change with this recipe key (or k=4, or teachers=a,b)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Grade the round (easy, mid, hard) and route it into shards, in SQL."""
    from pipeline.stages import grade as stage

    if what_if:
        from pipeline.what_if import what_if as compare

        return _show_what_if(compare(target, set or [], round, what_if), as_json)
    with _writing(target, set) as ctx:
        _tell(stage.run(ctx, ctx.newest_round() if round is None else round), as_json)


@app.command()
def train(
    target: Target, round: Round = None, set: Set = None, regenerate: Regenerate = False, as_json: Json = False
) -> None:
    """Train one round on its shards; goes on where a killed run stopped."""
    from pipeline.context import load
    from pipeline.stages import train as stage
    from pipeline.store import HELD
    from trainer import api

    if api.in_team():
        api.end_with_launcher()
    if os.environ.get("RANK", "0") != "0":  # one of several processes that torchrun started: rank 0 does the writing
        ctx = load(target, set)
        return stage.follow(ctx, ctx.newest_round() if round is None else round, api)
    with _writing(target, set) as ctx:
        outcomes = stage.run(ctx, ctx.newest_round() if round is None else round, api, regenerate=regenerate)
        if HELD not in os.environ:  # else whoever started this process tells
            _tell(outcomes, as_json)


@app.command()
def refresh(
    target: Target, round: Round = None, set: Set = None, regenerate: Regenerate = False, as_json: Json = False
) -> None:
    """Rollouts, verdicts, grades and shards for the newest checkpoint."""
    from pipeline.flow import refresh as flow

    with _writing(target, set) as ctx:
        r = ctx.trained_rounds() if round is None else round
        _tell(flow(ctx, r, regenerate=regenerate, reference=_reference(ctx)), as_json)


@app.command()
def run(target: Target, set: Set = None, regenerate: Regenerate = False, as_json: Json = False) -> None:
    """All stages, all rounds, evals before and after, and the report."""
    from pipeline.flow import run_all
    from trainer import api

    with _writing(target, set) as ctx:
        _tell(run_all(ctx, api, regenerate=regenerate, reference=_reference(ctx)), as_json)
        path = _write_report(ctx)
    if not as_json:
        _summary(ctx, path)


@app.command()
def eval(
    target: Target,
    round: Round = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="updates done; (round 0, step 0) is the base policy")
    ] = None,
    set: Set = None,
    regenerate: Regenerate = False,
    as_json: Json = False,
) -> None:
    """avg@n and pass@k with intervals on the eval suites; default: the newest checkpoint."""
    from pipeline.flow import final_step
    from pipeline.stages import evaluate

    with _writing(target, set) as ctx:
        if round is None and step is None and ctx.trained_rounds() == 0:
            round = step = 0
        r = ctx.trained_rounds() - 1 if round is None else round
        s = (final_step(ctx, r) if ctx.round_end(r) else 0) if step is None else step
        _tell(evaluate.run(ctx, r, s, regenerate=regenerate, reference=_reference(ctx)), as_json)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", help="methods, seeds, base policies, worlds (docs/study.md)")
    ],
    processes: Annotated[int, typer.Option("--processes", min=1, help="runs side by side, one thread each")] = 1,
    only: Annotated[
        str | None, typer.Option("--only", metavar="GLOB", help="results whose label fits, for example 'cells/*/*/dypo/0'")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="say what is there and what is due; run nothing")] = False,
    report: Annotated[bool, typer.Option("--report", help="write the report of what is there; run nothing")] = False,
    as_json: Json = False,
) -> None:
    """Every method, seed, base and world of a study, then its report; goes on where it was stopped."""
    from pipeline.study import command

    command.study(file, processes, only, plan, report, as_json)


# ---------------------------------------------------------------- looking
@app.command()
def plan(target: Target, set: Set = None, as_json: Json = False) -> None:
    """What would run and why, with rows, tokens, disk and time; a step's sizes and memory. Runs nothing, writes nothing."""
    from pipeline.context import load

    _show_plan(load(target, set), as_json, existing=False)


@app.command()
def status(run: RunFolder, as_json: Json = False) -> None:
    """What lies in the run, and what of it is stale."""
    from pipeline.context import load

    _show_plan(load(run), as_json, existing=True)


@app.command()
def verify(run: RunFolder, as_json: Json = False) -> None:
    """Hash every file of the run against its manifest: a flipped byte, a missing part, an orphan. Exit code 1 if there is one."""
    from pipeline.verify import HARM, Checked
    from pipeline.verify import verify as look

    checked, harmed = Checked(), 0
    for found in look(run, checked):
        harmed += found.kind in HARM
        print(json.dumps(vars(found)) if as_json else f"{found.kind}: {found.path}: {found.say}", flush=True)
    if as_json:
        print(json.dumps({"harmed": harmed, **vars(checked)}))
    else:
        print(
            f"{checked.partitions} partitions, {checked.files} files, {checked.bytes / 1e6:,.1f} MB: {harmed or 'nothing'} harmed"
        )
    if harmed:
        raise WorkError(f"{run}: {harmed} files are not what the run's manifests say")


@app.command()
def compact(run: RunFolder, as_json: Json = False) -> None:
    """Merge small part files into large ones: the same rows, the same identity. Old files go at the next compaction."""
    from pipeline.compact import compact as merge
    from pipeline.store import lock, need_run

    need_run(run)
    with lock(run.resolve()):
        for done in merge(run.resolve()):
            if as_json:
                print(json.dumps(vars(done)), flush=True)
            elif done.before != done.after:
                print(f"{done.partition}: {done.before} -> {done.after} parts, {done.rows:,} rows", flush=True)


@app.command()
def sql(
    run: RunFolder,
    query: Annotated[str | None, typer.Argument(help="one SELECT; without it, an interactive prompt")] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="RUN", help="ask this run too: every table has a first column `run` then"),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="seconds until a query is stopped")] = 600.0,
    as_json: Json = False,
) -> None:
    """Ask the run's tables in SQL (DuckDB, read-only)."""
    from pipeline import shell
    from pipeline.store import connect

    con = connect(run, *(others or []))
    if query is None:
        shell.interactive(con, as_json, timeout)
    else:
        shell.show(shell.query(con, query, timeout), as_json)


@app.command()
def explain(run: RunFolder, prompt_id: str, as_json: Json = False) -> None:
    """Everything about one prompt: traces, rollouts, verdicts, grades, route, the steps that trained on it."""
    from pipeline.explain import explain as look
    from pipeline.explain import render_explain
    from pipeline.store import connect

    found = look(connect(run), prompt_id)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, default=str))
    else:
        from rich.console import Console

        (Console() if sys.stdout.isatty() else Console(width=140)).print(render_explain(found))


@audit_app.command()
def logprobs(
    run: RunFolder,
    round: Annotated[
        int | None, typer.Option("--round", min=0, help="the refresh round; default: every round with shards")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sampler's log-probs against the trainer's, by policy: mean and worst difference, KL, effective sample size, worst tokens."""
    from pipeline.stages import audit
    from trainer import api

    with _writing(run, None) as ctx:
        for r in audit.rounds(ctx) if round is None else [round]:
            found = False
            for entry in audit.audit_logprobs(ctx, r, api):
                found = True
                print(json.dumps(entry, ensure_ascii=False), flush=True) if as_json else _show_audit(entry)
            if not found and not as_json:
                print(f"round {r}: no rollouts in its shards")


@app.command()
def replay(
    run: RunFolder,
    round: Annotated[int, typer.Option("--round", min=0, help="the round")],
    step: Annotated[int, typer.Option("--step", min=0, help="the optimizer step within it, from 0")],
    set: Set = None,
    as_json: Json = False,
) -> None:
    """Compute one optimizer step again, bitwise; with --set train.method.KEY, as another loss would have made it."""
    from pipeline import replay as stage
    from trainer import api

    found = stage.replay(run, round, step, api, set or [])
    print(json.dumps(found) if as_json else stage.render(found))
    stage.refuse_difference(found)


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option("--out", help="default: RUN/report.html")] = None,
) -> None:
    """One self-contained HTML file with pictures; opens with no network."""
    from pipeline.context import load

    print(_write_report(load(run), out))


probe = typer.Typer(no_args_is_help=True, help="Measure the loss on stored rows, without generation.")
app.add_typer(probe, name="probe")


@probe.command()
def variance(
    run: RunFolder,
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the newest round with shards")] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="a checkpoint of the round; default: the policy that sampled it")
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="at most so many Mid and so many Hard prompts")] = 256,
    sketch: Annotated[int, typer.Option("--sketch", min=1, help="numbers kept of each gradient")] = 16384,
    as_json: Json = False,
) -> None:
    """Variance, signal and correlation of SFT's, GRPO's, GAL's and the mix's gradients: the paper's Eq. 19, measured."""
    from pipeline import probe
    from pipeline.context import load
    from trainer import api

    found = probe.variance(load(run), api, round=round, step=step, prompts=prompts, sketch=sketch)
    if as_json:
        print(json.dumps(found))
    else:
        from rich.console import Console

        (Console() if sys.stdout.isatty() else Console(width=160)).print(probe.render(found))


# ---------------------------------------------------------------- printing
def _write_report(ctx: "Context", out: Path | None = None) -> Path:
    from pipeline.report import build_report
    from pipeline.store import connect, partitions, publish
    from schemas.tables import TABLES

    manifests = [m for t in [*TABLES, "checkpoints"] for p in partitions(ctx.run, t) if (m := p.manifest())]
    html = build_report(connect(ctx.run), ctx.recipe, manifests)
    return publish(out or ctx.run / "report.html", lambda p: p.write_text(html, encoding="utf-8"))


def _summary(ctx: "Context", report: Path) -> None:
    """What `make demo` ends with: the evals, the grade mix by round, the report, three queries to try."""
    from pipeline import shell
    from pipeline.store import connect

    con = connect(ctx.run)
    run = _relative(ctx.run)
    print("\nEvals (95 % intervals over problems)")
    shell.show(
        shell.query(con, "select suite, metric, round, step, value, ci_low, ci_high, problems from evals order by all"),
        False,
    )
    print("\nGrade mix by round")
    mix = ", ".join(f"count(*) filter (where grade = '{g}') as {g}" for g in ("easy", "mid", "hard"))
    shell.show(shell.query(con, f"select round, {mix} from grades group by round order by round"), False)
    print(f"\nReport: {_relative(report)}\n\nThree queries to try:")
    for text in (
        "select round, grade, count(*) from grades group by all order by all",
        "select teacher, status, count(*) from scores where kind = 'trace' group by all order by all",
        "select p.messages[1].content as prompt, r.text, s.status from rollouts r join scores s on s.id = r.rollout_id "
        "join prompts p on p.prompt_id = r.prompt_id where s.status = 'wrong' order by r.round desc, r.rollout_id limit 5",
    ):
        print(f'  dypo sql {run} "{text}"')


def _show_what_if(found: "WhatIf", as_json: bool) -> None:
    """Prompts by where they go now and then, what each route trains on, and how many change."""
    import pyarrow as pa

    from pipeline import shell

    if as_json:
        return print(json.dumps(vars(found)))
    asked, changed = ", ".join(found.settings), len(found.changed)
    print(f"round {found.round} with {asked}: {changed} of {found.prompts} prompts change (nothing was written)\n")
    for rows in (found.moves, found.routes):
        shell.show(pa.Table.from_pylist(rows), False)


def _show_rescored(found: "Rescored", target: Path, overrides: list[str], as_json: bool) -> None:
    """Verdicts that flipped, some of them in full, and what would be graded and routed otherwise."""
    import shlex

    import pyarrow as pa

    from pipeline import shell

    if as_json:
        return print(json.dumps(vars(found)))
    flipped = sum(row["rows"] for row in found.flips)
    words = shlex.join([str(target), f"--round={found.round}", *(f"--set={item}" for item in overrides)])
    print(
        f"version {found.version} -> today's: {flipped} of {found.verdicts} verdicts flip (scores and grades are as they were)"
    )
    for label in found.without:
        print(f"  {label}: has no verdicts of version {found.version}; today's were compared with the stored ones")
    for rows in (found.flips, found.examples):
        if rows:
            print()
            shell.show(pa.Table.from_pylist(rows), False)
    print(
        f"\nround {found.round}: {len(found.changed)} of {found.prompts} prompts change (now: by version {found.version}, then: by today's)\n"
    )
    for rows in (found.moves, found.routes):
        shell.show(pa.Table.from_pylist(rows), False)
    print(
        f"\n`dypo score {words}` makes today's verdicts the run's, without judging again; then `dypo grade {target} --round={found.round}`"
    )


def _show_audit(entry: dict[str, Any]) -> None:
    """One policy's audit: a line of numbers, the verdict, the worst tokens."""
    import pyarrow as pa

    from pipeline import shell

    print(
        f"round {entry['round']}, policy {entry['policy'][:12]}: {entry['rows']} rows, {entry['tokens']} tokens; |sampler - trainer| "
        f"mean {entry['mean_difference']:.3g}, max {entry['max_difference']:.3g} nats; KL {entry['kl']:.3g}; effective sample size "
        f"{entry['ess']:.4f} by token, {entry['ess_sequence']:.4f} by row"
    )
    limit = f"train.max_logprob_difference = {entry['limit']:g}"
    print(f"  above {limit}: `dypo train` refuses this round" if entry["refused"] else f"  within {limit}")
    shown = [{**t, "text": json.dumps(t["text"], ensure_ascii=False)} for t in entry["worst_tokens"]]
    shell.show(pa.Table.from_pylist(shown), False)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _show_plan(ctx: "Context", as_json: bool, existing: bool) -> None:
    from pipeline.plan import plan as look

    rows = [p for p in look(ctx) if not existing or p.have or p.state in ("done", "stale", "partial")]
    if as_json:
        for p in rows:
            print(json.dumps(vars(p)))
        if not existing:
            _show_sizes(ctx, as_json)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    t = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("partition", "state", "rows", "to do", "tokens, at most", "disk, at most", "time", "why"):
        t.add_column(name, overflow="fold", justify="right" if name in ("rows", "to do") else "left")
    for p in rows:
        due = p.state != "done"
        t.add_row(
            p.partition,
            p.state,
            f"{p.have:,}",
            f"{p.rows:,}" if due and p.rows is not None else "",
            f"{p.max_tokens:,}" if due and p.max_tokens else "",
            f"{p.disk_bytes / 1e6:,.1f} MB" if due and p.disk_bytes else "",
            f"{p.seconds:,.0f} s" if due and p.seconds is not None else "",
            escape(p.why),
        )
    (Console() if sys.stdout.isatty() else Console(width=200)).print(t)
    left = [p for p in rows if p.state != "done"]
    if not existing:
        print(f"{len(left)} of {len(rows)} partitions would be made")
        _show_sizes(ctx, as_json)
    elif not left:
        print("up to date")


def _show_sizes(ctx: "Context", as_json: bool) -> None:
    """The derived sizes of an optimizer step and the memory that training takes, so that nobody has to multiply."""
    from pipeline.sizes import in_words, sizes

    found = sizes(ctx)
    if as_json:
        return print(json.dumps(found.as_json()))
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for title, lines in zip(("an optimizer step", "memory of a training process"), in_words(found, ctx.recipe), strict=True):
        t = Table(box=None, pad_edge=False, show_header=False, title=f"\n{title}", title_justify="left", title_style="bold")
        for justify in ("left", "right", "left"):
            t.add_column(justify=justify, overflow="fold")
        for line in lines:
            t.add_row(*map(escape, line))
        (Console() if sys.stdout.isatty() else Console(width=200)).print(t)
