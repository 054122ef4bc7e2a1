"""One round's grades and shards, computed in DuckDB from stored rows into files of a scratch folder.

One idea: everything is decided on keys and lengths (verdicts.sql, then the grading and the routing query); token lists are
joined to the routed keys at the end (sequences.sql) and go to Parquet as a stream. Nothing that grows with the run is held:
DuckDB sorts and joins a slice of the prompts at a time, under `grade.memory_mb` and on disk, and results come in batches.
The stage (stages/grade.py) puts the files into their partitions once every check has passed; a what-if only reads them.
Left out: fingerprints and partitions.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import skips
from pipeline.context import Context
from pipeline.rating import Rating
from pipeline.stages.generate import round_prompt_ids
from pipeline.store import (
    ROW_GROUP,
    ROW_GROUP_OF_KEYS,
    ask,
    open_views,
    partitions,
    regrouped,
    sql,
    stream,
    view_parts,
    write_parts,
)
from pipeline.traces import FITTING, write_fitting_traces
from schemas.errors import UserError
from schemas.methods import Method
from schemas.methods.base import Adjustment
from schemas.tables import ARROW

LISTS = ("prompt_tokens", "tokens", "old_logprobs")
ROUTED = pa.schema([f for f in ARROW["shards"] if f.name not in LISTS])
WEIGHTS = pa.schema([("prompt_id", pa.string()), ("weight", pa.float64())])
IDS = pa.schema([("prompt_id", pa.string())])
STORED = "select view_name from duckdb_views() where not internal and not temporary order by all"
SLICED = (
    "rollouts",
    "scores",
    "round_prompts",
    "verdicts",
    "fitting_traces",
    "grades",
    "earlier_grades",
    "curriculum",
    "ratings",
    "routed",
)
ROWS_PER_MB = 16_000  # rollouts of a slice; DuckDB spills part of its joins and sorts then, and does not run out (measured)
MB_PER_THREAD = 256  # DuckDB runs out of memory where many threads share little of it


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder of its own that is gone afterwards: in `folder`, or where the system has its temporary files."""
    with tempfile.TemporaryDirectory(prefix=".grading.", suffix=".tmp", dir=folder) as made:
        yield Path(made)


def query_text(own: Path | None, built_in: str, known: Sequence[str] = ()) -> str:
    """The recipe's own query, or ours. UserError if the file is not there. known: names of ours that could have been meant."""
    if own is None:
        return sql(built_in)
    if not own.exists():
        ours = f", and none of ours is named so ({', '.join(known)})" if known else ""
        raise UserError(f"{own}: no such query file (named by the recipe){ours}")
    return own.read_text()


def curriculum_text(curriculum: str | Path) -> str | None:
    """The query of a recipe's curriculum; None for the uniform one, which needs none."""
    if curriculum == "uniform":
        return None
    own = curriculum if isinstance(curriculum, Path) else None
    return query_text(own, f"curriculum/{curriculum}", ("uniform", "pass_rate", "transition"))


@cache
def tables_read(text: str) -> set[str]:
    """The tables and views that a query names; none of one that DuckDB cannot parse, which is told where it is run."""
    import duckdb

    try:
        return duckdb.connect().get_table_names(re.sub(r"\$\w+", "null", text))
    except duckdb.Error:
        return set()


def adjust_texts(method: Method) -> list[tuple[str, str, bool]]:
    """(name, query, whether it is the user's own) of each of a method's adjustments."""
    own = [isinstance(a, Path) for a in method.adjust]
    known = get_args(Adjustment)
    texts = [query_text(a if isinstance(a, Path) else None, f"adjust/{a}", known) for a in method.adjust]
    return list(zip(map(str, method.adjust), texts, own, strict=True))


def routing_parameters(method: Method, round: int) -> dict[str, Any]:
    """What a routing query is told of the method: which grades it trains on in this round, how, and its advantage."""
    routing, grpo = method.routing(round), method.loss.grpo
    return {
        "rl": list(routing.rl), "sft": list(routing.sft), "union": routing.union, "graded": bool(routing.rl),
        "min_pass_rate": routing.pass_rate[0], "max_pass_rate": routing.pass_rate[1],
        "rated": routing.discriminator is not None, "advantage": grpo.advantage, "eps": grpo.eps,
    }  # fmt: skip


class Grading:
    """The round's verdicts and fitting traces, and from them its grades, then its routed sequences, in this order.

    scores: parts with verdicts that count in place of the stored ones on the same rows.
    """

    def __init__(self, ctx: Context, round: int, folder: Path, scores: Sequence[Path] = ()) -> None:
        self.ctx, self.round, self.folder = ctx, round, folder
        g = ctx.recipe.grade
        self._con = open_views(ctx.run)
        if scores:
            view_parts(self._con, "other_scores", list(scores), ARROW["scores"])
            self._con.execute("alter view scores rename to stored_scores")
            self._con.execute(f"create view scores as {sql('what_if/scores')}")
        self._con.execute(f"set memory_limit = '{g.memory_mb}MB'")
        self._con.execute(f"set temp_directory = '{folder / 'spill'}'")
        self._con.execute("set enable_external_file_cache = false")  # each file is read once or twice
        (cores,) = self._con.execute("select current_setting('threads')").fetchall()[0]
        self._con.execute(f"set threads = {max(1, min(cores, g.memory_mb // MB_PER_THREAD))}")
        drawn, prompts = folder / "drawn.parquet", folder / "round_prompts.parquet"
        _write(drawn, IDS, (pa.record_batch([ids], schema=IDS) for ids in round_prompt_ids(ctx, round)))
        view_parts(self._con, "drawn", [drawn], IDS, "file_row_number=true")
        self._slices = self._sliced(pq.read_metadata(drawn).num_rows)
        self._con.register("skipped", skips.rows(ctx, round))
        self._con.execute(f"copy ({sql('round_prompts')}) to $path", {"round": round, "path": str(prompts)})
        self._con.unregister("skipped")
        view_parts(self._con, "round_prompts", [prompts], pa.schema([]))
        earlier = [f for p in partitions(ctx.run, "grades") if int(dict(p.keys)["round"]) < round for f in p.files()]
        view_parts(self._con, "earlier_grades", earlier, ARROW["grades"])
        self._refuse_unscored()
        traces = folder / "fitting_traces.parquet"
        write_fitting_traces(ctx, self._con, round, traces)
        view_parts(self._con, "fitting_traces", [traces], FITTING)

    def _refuse_unscored(self) -> None:
        """Makes `verdicts`, one row a rollout; UserError if a rollout has none, or a trace."""
        keys = {"k": self.ctx.recipe.rollouts.k}
        self._ordered_by_the_query(True)
        paths: list[Path] = []
        for _ in self._by_slices():  # files, not a table: DuckDB holds more of a table that it spilled than it has room for
            paths.append(self.folder / f"verdicts-{len(paths)}.parquet")
            self._con.execute(f"copy ({sql('verdicts')}) to $path (compression lz4)", {**keys, "path": str(paths[-1])})
        view_parts(self._con, "verdicts", paths, pa.schema([]))
        for kind in ("rollouts", "traces"):
            if kind == "rollouts" and all(self._judged() for _ in self._by_slices()):
                continue
            unscored = ask(self._con, sql(f"checks/unscored_{kind}"), **(keys if kind == "rollouts" else {}))
            if unscored.num_rows:
                raise UserError(
                    f"round {self.round}: {unscored.num_rows} {kind} have no verdict (first: {kind[:-1]} "
                    f"{unscored.column('id')[0]}). Run `dypo score {self.ctx.run} --round {self.round}` first"
                )

    def _judged(self) -> bool:
        """Whether `verdicts` has as many rows as there are rollouts to grade: ids are unique, so none is missing then."""
        got = ask(self._con, sql("checks/judged"), k=self.ctx.recipe.rollouts.k).to_pylist()[0]
        return got["rollouts"] == got["verdicts"]

    # ------------------------------------------------------------ grades
    def grades(self, fingerprint: str) -> list[Path]:
        """The parts of the round's grades, which the rest goes on from."""
        g = self.ctx.recipe.grade
        name = str(g.query or "grade.sql")
        batches = self._select(
            query_text(g.query, "grade"), ARROW["grades"], "grades", name, own=g.query is not None,
            round=self.round, k=self.ctx.recipe.rollouts.k, hard_max_successes=g.hard_max_successes,
            easy_max_failures=g.easy_max_failures, max_tokens=g.max_tokens, unjudged_to_routes=g.unjudged_to_routes,
        )  # fmt: skip
        made = write_parts(self.folder / "grades", "grades", batches, fingerprint)
        self.use_grades(made)
        self._refuse_offenders("grades", name, g.query is not None, round=self.round)
        return made

    def use_grades(self, parts: list[Path]) -> None:
        """Goes on from these parts."""
        view_parts(self._con, "grades", parts, ARROW["grades"])

    def count(self, column: str) -> dict[str, int]:
        """How many prompts have each value of a column of the grades."""
        rows = self._con.execute(f"select {column}, count(*) from grades where round = {self.round} group by 1 order by 1")
        return dict(rows.fetchall())

    # ------------------------------------------------------------ ratings
    def rate(self, fingerprint: str) -> tuple[list[Path], dict[str, Any]]:
        """The parts of the round's ratings, which routing goes on from, and what was found of the discriminators."""
        settings = self.ctx.recipe.train.method.routing(self.round).discriminator
        assert settings is not None
        rating = Rating(settings, self.ctx.recipe.seed, self.round)
        prompts = self.folder / "rated_prompts.parquet"
        self._con.execute(f"copy ({sql('rated_prompts')}) to $path", {"round": self.round, "path": str(prompts)})
        view_parts(self._con, "rated_prompts", [prompts], pa.schema([]))
        ids = (i for batch in stream(self._con, "from rated_prompts") for i in batch["prompt_id"].to_pylist())
        self._con.register("learned", pa.table({"prompt_id": pa.array(rating.chosen(ids), pa.string())}))
        rows = rating.rows(self._rated(all=False), lambda: self._rated(all=True))
        made = write_parts(self.folder / "ratings", "ratings", rows, fingerprint)
        self.use_ratings(made)
        return made, rating.facts

    def _rated(self, *, all: bool) -> Iterator[pa.RecordBatch]:
        self._ordered_by_the_query(True)
        for _ in self._by_slices():
            max_tokens = self.ctx.recipe.grade.max_tokens
            yield from stream(self._con, sql("rated"), ROW_GROUP, max_tokens=max_tokens, all=all)

    def use_ratings(self, parts: list[Path]) -> None:
        """Goes on from these parts."""
        view_parts(self._con, "ratings", parts, ARROW["ratings"])

    # ------------------------------------------------------------ routes
    def route(self) -> None:
        """Makes the keys of what is routed, one row a sequence, with the curriculum's weights."""
        method, g = self.ctx.recipe.train.method, self.ctx.recipe.grade
        name, routing = str(method.query or "route.sql"), routing_parameters(method, self.round)
        batches = self._select(
            query_text(method.query, "route"), ROUTED, "shards", name, own=method.query is not None,
            round=self.round, k=self.ctx.recipe.rollouts.k, max_tokens=g.max_tokens,
            policy="" if routing["graded"] else self.ctx.policy_of(self.round)[1], **routing,
        )  # fmt: skip
        self._routing_is_own = method.query is not None
        self._write_routed("routed", batches)
        for at, (adjustment, text, own) in enumerate(adjust_texts(method)):
            name = f"{name} with {adjustment}"
            self._routing_is_own |= own
            if "coverage" in tables_read(text):  # of no prompt by itself
                self._con.execute(f"create or replace table coverage as {sql('coverage')}")
            rows = self._select(
                text, ROUTED, "shards", adjustment, own=self._routing_is_own, round=self.round, k=self.ctx.recipe.rollouts.k,
                max_tokens=g.max_tokens, advantage=routing["advantage"], eps=routing["eps"],
                hard_max_successes=g.hard_max_successes, easy_max_failures=g.easy_max_failures,
            )  # fmt: skip
            self._write_routed(f"adjusted-{at}", rows)
        if routing["graded"] and (text := curriculum_text(g.curriculum)) is not None:  # without grades all weigh the same
            name = f"{name} with curriculum {g.curriculum}"
            own = isinstance(g.curriculum, Path)
            weights = self._select(text, WEIGHTS, "a curriculum", str(g.curriculum), own=own, round=self.round)
            path = self.folder / "curriculum.parquet"
            _write(path, WEIGHTS, weights)
            view_parts(self._con, "curriculum", [path], WEIGHTS)
            weighted = self._select(sql("weighted"), ROUTED, "shards", "weighted.sql", own=self._routing_is_own)
            self._write_routed("weighted", weighted)
        self._refuse_offenders("shards", name, self._routing_is_own)

    def _write_routed(self, name: str, batches: Iterable[pa.RecordBatch]) -> None:
        """What is routed from now on."""
        self._routed = self.folder / f"{name}.parquet"
        _write(self._routed, ROUTED, batches)
        view_parts(self._con, "routed", [self._routed], ROUTED, "file_row_number=true")

    def sequences(self, route: str, fingerprint: str) -> tuple[list[Path], dict[str, int]]:
        """The parts of one route's shard, and how many prompts and response tokens it has."""
        self._ordered_by_the_query(True)
        query = "select count(distinct prompt_id) as prompts from routed where route = $route"
        facts = {**ask(self._con, query, route=route).to_pylist()[0], "response_tokens": 0}
        rows = _counted(self._with_lists(route), facts)
        return write_parts(self.folder / route, "shards", rows, fingerprint), facts

    def _with_lists(self, route: str) -> Iterator[pa.RecordBatch]:
        """The routed keys of a route, each with its lists: two streams in one order, side by side."""
        keys = regrouped(_placed(self._routed, route), ROW_GROUP)
        lists = regrouped(self._lists(route), ROW_GROUP)
        for mine, theirs in zip_longest(keys, lists):
            if theirs is None or not mine["place"].equals(theirs["place"]):
                there = set(theirs["place"].to_pylist()) if theirs is not None else set()
                row = next(r for r in mine.to_pylist() if r["place"] not in there)
                raise UserError(
                    f"{route} row {row['item_id']} of prompt {row['prompt_id']}: a query routed it, and it is no "
                    f"{'rollout of round ' + str(row['source_round']) if route == 'rl' else 'verified trace that fits'}"
                )
            for name in LISTS:
                mine = mine.append_column(name, theirs[name])
            yield from mine.drop_columns(["place"]).combine_chunks().to_batches()

    def _lists(self, route: str) -> Iterator[pa.RecordBatch]:
        for _ in self._by_slices(whole=self._routing_is_own):
            yield from stream(self._con, sql("sequences"), ROW_GROUP, route=route)

    def lengths(self) -> Path:
        """The routed keys with the `length` of each response."""
        path = self.folder / "lengths.parquet"
        self._con.execute(f"copy ({sql('what_if/lengths')}) to $path", {"path": str(path)})
        return path

    # ------------------------------------------------------------ both
    def _select(
        self, text: str, want: pa.Schema, table: str, name: str, *, own: bool = False, **parameters: Any
    ) -> Iterator[pa.RecordBatch]:
        """Streams a query's result with those of the parameters it names; it must have the columns of `want`.

        A query of the user's own may compare prompts with one another, so it sees all of them at once.
        """
        import duckdb

        try:
            self._ordered_by_the_query(not own)
            named = self._con.extract_statements(text)[0].named_parameters
            used = {k: v for k, v in parameters.items() if k in named}
            for _ in self._by_slices(whole=own):
                batches = stream(self._con, text, **used)
                missing = [n for n in want.names if n not in batches.schema.names]
                if missing:
                    raise UserError(
                        f"{name}: the result lacks {', '.join(missing)}; the columns of {table} are {', '.join(want.names)}"
                    )
                for batch in batches:
                    yield from _cast(batch, want, table, name)
        except duckdb.Error as e:
            raise UserError(
                f"{name}: DuckDB refused the query: {e}. It may use the parameters {', '.join(parameters)}"
            ) from None

    def _ordered_by_the_query(self, yes: bool) -> None:
        """Ours all say their order, which spares DuckDB to keep one; a user's may lean on the order of what it reads."""
        self._con.execute(f"set preserve_insertion_order = {not yes}")

    def _sliced(self, prompts: int) -> list[tuple[str, str]]:
        """The round's sorted prompts as ranges of about the same size, each its first and last id."""
        rows = prompts * self.ctx.recipe.rollouts.k
        n = max(1, min(math.ceil(rows / (self.ctx.recipe.grade.memory_mb * ROWS_PER_MB)), prompts))
        cuts = [(prompts * i // n, prompts * (i + 1) // n - 1) for i in range(n)] if prompts else []
        ends = ", ".join(str(place) for cut in cuts for place in cut) or "-1"
        query = f"select file_row_number, prompt_id from drawn where file_row_number in ({ends})"
        at = dict(self._con.execute(query).fetchall())
        return [(at[first], at[last]) for first, last in cuts]

    def _by_slices(self, whole: bool = False) -> Iterator[None]:
        """One turn for each slice of the prompts, in which every view has the rows of its prompts only; `whole`: one turn for all.

        Grading and routing are of each prompt by itself, so the slices' results one after the other are the whole's; what DuckDB
        has to hold is that of a slice. Temporary views stand before the others of their name.
        """
        if whole or len(self._slices) < 2:
            yield
            return
        names = [n for (n,) in self._con.execute(STORED).fetchall() if n in SLICED]
        for first, last in self._slices:
            for name in names:
                rows = f"select * from memory.main.{name} where prompt_id between '{first}' and '{last}'"
                self._con.execute(f"create or replace temp view {name} as {rows}")
            yield
        for name in names:
            self._con.execute(f"drop view temp.main.{name}")

    def _refuse_offenders(self, table: str, name: str, own: bool, **parameters: Any) -> None:
        """UserError if a query's result breaks a rule of its table: checks/TABLE.sql returns the offending rows."""
        for _ in self._by_slices(whole=own):
            self._con.execute(
                f"create or replace temp view new_{table} as from {'grades' if table == 'grades' else 'routed'}"
            )
            bad = ask(self._con, sql(f"checks/{table}"), **parameters)
            if bad.num_rows == 0:
                continue
            first = bad.slice(0, 1).to_pylist()[0]
            where = ", ".join(f"{k} {v}" for k, v in first.items() if k != "why")
            raise UserError(
                f"{name}: the query returned {bad.num_rows} rows that break a rule; the first ({where}): {first['why']}"
            )


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pq.ParquetWriter(path, schema, compression="lz4") as writer:
        for group in regrouped(batches, ROW_GROUP_OF_KEYS):
            writer.write_table(group)


def _placed(path: Path, route: str) -> Iterator[pa.RecordBatch]:
    """The rows of one route in a file of routed keys, with the place of each in the file."""
    at = 0
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(4 * ROW_GROUP):
        places = pa.array(range(at, at + batch.num_rows), pa.int64())
        at += batch.num_rows
        yield batch.append_column("place", places).filter(pc.field("route") == route)


def _cast(batch: pa.RecordBatch, want: pa.Schema, table: str, name: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from pa.Table.from_batches([batch]).select(want.names).cast(want).to_batches()
    except (pa.ArrowInvalid, ValueError, pa.ArrowNotImplementedError) as e:
        raise UserError(f"{name}: the result does not fit table {table}: {e}") from None


def _counted(batches: Iterable[pa.RecordBatch], facts: dict[str, int]) -> Iterator[pa.RecordBatch]:
    """The batches as they are, their response tokens added up. UserError for a sequence without tokens or log-probs of them."""
    for batch in batches:
        tokens = pc.call_function("list_value_length", [batch["tokens"]])
        olds = pc.call_function("list_value_length", [batch["old_logprobs"]])
        for bad, why in (
            (pc.call_function("equal", [tokens, pa.scalar(0)]), "has no response token"),
            (pc.call_function("not_equal", [tokens, olds]), "has old_logprobs and tokens of different lengths"),
        ):
            if (first := batch.filter(bad.fill_null(False))).num_rows:
                raise UserError(
                    f"{first['route'][0]} row {first['item_id'][0]} of prompt {first['prompt_id'][0]} {why}: the stored "
                    "rollout or trace is broken. `dypo verify` tells whether its file is altered"
                )
        facts["response_tokens"] += pc.call_function("sum", [tokens]).as_py() or 0
        yield batch
