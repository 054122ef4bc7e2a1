"""`dypo grade` on ten million rollouts beside the SQL it stands on, polars, pandas and a plain Python loop: time and memory.

    python -m tests.bench.grade [--rows N] [--repeat N] [--keep FOLDER] [--json]        or  make bench-grade

The rows are made (tests/bench/made_run.py): keys, verdicts and lengths as in a real run, one token in each list. Every contestant
runs in a process of its own and reads the same Parquet; memory is the most that the whole process held, its imports included.
    stage     all of `dypo grade`: inputs hashed, tokenizer checked, queries, checks, parts with token lists, digests, manifests
    sql       the stage's own queries (verdicts, grade, route, sequences) as DuckDB COPYs under the same settings, nothing else
    polars    the same counts, grades, reasons, advantages and weights, written to two files, without token lists
    pandas    the same
    loop      the stage's whole job, token lists too, in dicts and lists on the first 500,000 rows; its time scaled up to all
More rows than 10,000,000 are graded by the stage alone, at both sizes. What each made of the rows must agree.
Then the join that writes token lists into shards: the stage on 200,000 and on 600,000 rollouts of 256 tokens on average, where its
memory must not follow the rows. It ends with exit code 1, saying which, where a floor is missed (FLOORS, MEMORY_MB, STREAMS).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.grading import routing_parameters
from schemas.methods import DypoMethod
from tests.bench.machine import peak_mb

ROWS = 10_000_000
LOOP_ROWS = 500_000
K, EPS = 8, 1e-6
ROUTING = routing_parameters(DypoMethod(), 0)
FLOORS = {"stage / sql, time": 1.3, "stage / loop, time": 1 / 6, "stage / pandas, memory": 0.5}
LINEAR = 1.3
MEMORY_MB = {10_000_000: 1024, 100_000_000: 2048}
MEMORY_MB_OF_DUCKDB = 1024  # grade.memory_mb past ROWS; its default up to there
TOKENS, LISTS = 256, (200_000, 600_000)
STREAMS = 1.25  # memory at the larger of LISTS over that at the smaller
Answer = dict[str, float]  # what is compared: prompts by reason, successes, and the advantages' absolute sum


def parts(run: Path, table: str) -> list[str]:
    return sorted(map(str, (run / table).rglob("part-*.parquet")))


# ---------------------------------------------------------------- contestants: run folder, scratch folder -> answer
def stage(run: Path, _: Path) -> Answer:
    from pipeline.context import load
    from pipeline.stages import grade

    for table in ("grades", "shards"):
        shutil.rmtree(run / table, ignore_errors=True)
    ctx = load(run)
    grade.run(ctx, 0)
    return {}


def sql(run: Path, out: Path) -> Answer:
    import duckdb
    import pyarrow as pa

    from pipeline.context import load
    from pipeline.grading import MB_PER_THREAD
    from pipeline.store import open_views, view_parts
    from pipeline.store import sql as text

    g = load(run).recipe.grade
    con: duckdb.DuckDBPyConnection = open_views(run)
    for setting in (
        f"memory_limit = '{g.memory_mb}MB'", f"threads = {max(1, min(2, g.memory_mb // MB_PER_THREAD))}",
        f"temp_directory = '{out}/spill'", "preserve_insertion_order = false", "enable_external_file_cache = false",
    ):  # fmt: skip
        con.execute(f"set {setting}")
    con.execute(
        "create view round_prompts as select prompt_id, 0 as source_round, null::varchar as decided, false as stale from prompts"
    )
    con.execute(
        "create view fitting_traces as select *, [0] as prompt_tokens, [0] as tokens, 0 as n_tokens, 0e0 as reward from traces"
    )
    for name, made, parameters, options in (
        ("verdicts", "verdicts", {"k": K}, "union_by_name=true"),
        ("grade", "grades", {
            "round": 0, "k": K, "hard_max_successes": 0, "easy_max_failures": 0, "max_tokens": 8192, "unjudged_to_routes": False,
        }, "union_by_name=true"),
        ("route", "routed", {**ROUTING, "round": 0, "max_tokens": 8192, "policy": ""}, "file_row_number=true"),
        ("sequences", "sequences", {"route": "rl"}, "union_by_name=true"),
    ):  # fmt: skip
        path = out / f"{made}.parquet"
        con.execute(f"copy ({text(name)}) to $path (compression zstd)", {**parameters, "path": str(path)})
        view_parts(con, made, [path], pa.schema([]), options)
    return {}


def with_polars(run: Path, out: Path) -> Answer:
    import polars as pl

    rollouts = pl.scan_parquet(parts(run, "rollouts"), hive_partitioning=False)
    scores = pl.scan_parquet(parts(run, "scores"), hive_partitioning=False)
    judged = rollouts.filter(pl.col("round") == 0, pl.col("sample") < K).select(
        "rollout_id", "prompt_id", "sample", "policy", "temperature", "finish_reason", n=pl.col("prompt_length") + pl.col("length")
    ).join(scores.select("id", "status", "reward", "correct"), left_on="rollout_id", right_on="id").collect(engine="streaming")  # fmt: skip
    hard, easy = pl.col("successes") == 0, pl.col("successes") == pl.col("k")
    unjudged = pl.col("status").is_in(["timeout", "error", "gold_bad"])
    grades = judged.group_by("prompt_id").agg(
        pl.col("policy").min(), k=pl.len(), successes=pl.col("correct").sum(), unjudged=unjudged.sum(), longest=pl.col("n").max()
    ).with_columns(
        reason=pl.when(pl.col("k") < K).then(pl.lit("incomplete_group")).when(pl.col("unjudged") > 0).then(pl.lit("unjudged"))
        .when(easy).then(pl.lit("easy")).when(hard).then(pl.lit("no_verified_trace"))
        .when(pl.col("longest") <= 8192).then(pl.lit("rl")).otherwise(pl.lit("too_long"))
    ).sort("prompt_id")  # fmt: skip
    grades.write_parquet(out / "grades.parquet")
    reward = pl.col("reward")
    centred = reward - reward.mean().over("prompt_id")
    rows = judged.join(grades.filter(pl.col("reason") == "rl").select("prompt_id"), on="prompt_id", how="semi").with_columns(
        advantage=pl.when(reward.max().over("prompt_id") == reward.min().over("prompt_id")).then(0.0)
        .otherwise(centred / (reward.std().over("prompt_id") + EPS)),
        w_sft=pl.lit(0.0), w_grpo=pl.lit(1.0), w_gal=pl.lit(1.0),
    ).sort("prompt_id", "sample")  # fmt: skip
    rows.write_parquet(out / "rows.parquet")
    return answer(
        dict(grades["reason"].value_counts().iter_rows()), grades["successes"].sum(), rows["advantage"].abs().sum()
    )


def with_pandas(run: Path, out: Path) -> Answer:
    import numpy as np
    import pandas as pd

    def read(table: str, columns: list[str]) -> "pd.DataFrame":
        return pd.concat([pd.read_parquet(path, columns=columns, partitioning=None) for path in parts(run, table)])

    names = [
        "rollout_id",
        "prompt_id",
        "round",
        "sample",
        "policy",
        "temperature",
        "finish_reason",
        "prompt_length",
        "length",
    ]
    rollouts = read("rollouts", names)
    rollouts = rollouts[(rollouts["round"] == 0) & (rollouts["sample"] < K)]
    judged = rollouts.merge(read("scores", ["id", "status", "reward", "correct"]), left_on="rollout_id", right_on="id")
    judged["unjudged"] = judged["status"].isin(["timeout", "error", "gold_bad"])
    judged["n"] = judged["prompt_length"] + judged["length"]
    grades = judged.groupby("prompt_id").agg(
        policy=("policy", "min"), k=("sample", "size"), successes=("correct", "sum"), unjudged=("unjudged", "sum"), longest=("n", "max")
    ).reset_index()  # fmt: skip
    grades["reason"] = np.select(
        [grades.k < K, grades.unjudged > 0, grades.successes == grades.k, grades.successes == 0, grades.longest <= 8192],
        ["incomplete_group", "unjudged", "easy", "no_verified_trace", "rl"], "too_long",
    )  # fmt: skip
    grades.to_parquet(out / "grades.parquet")
    rows = judged[judged["prompt_id"].isin(grades.loc[grades.reason == "rl", "prompt_id"])].sort_values(
        ["prompt_id", "sample"]
    )
    by = rows.groupby("prompt_id")["reward"]
    std = by.transform("std")
    flat = by.transform("max") == by.transform("min")
    rows["advantage"] = np.where(flat, 0.0, (rows["reward"] - by.transform("mean")) / (std + EPS))
    rows["w_sft"], rows["w_grpo"], rows["w_gal"] = 0.0, 1.0, 1.0
    rows.to_parquet(out / "rows.parquet")
    return answer(grades["reason"].value_counts().to_dict(), grades["successes"].sum(), rows["advantage"].abs().sum())


def loop(run: Path, out: Path) -> Answer:
    """On the first LOOP_ROWS rows."""
    from collections import Counter
    from statistics import fmean, stdev

    import pyarrow as pa
    import pyarrow.parquet as pq

    def first(table: str, columns: list[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for path in parts(run, table):
            for batch in pq.ParquetFile(path).iter_batches(columns=columns):
                rows += batch.to_pylist()
                if len(rows) >= LOOP_ROWS:
                    return rows[:LOOP_ROWS]
        return rows

    verdicts = {s["id"]: s for s in first("scores", ["id", "status", "reward", "correct"])}
    names = [
        "rollout_id",
        "prompt_id",
        "round",
        "sample",
        "policy",
        "temperature",
        "finish_reason",
        "prompt_length",
        "length",
    ]
    names += ["prompt_tokens", "tokens", "logprobs"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in first("rollouts", names):
        if r["round"] == 0 and r["sample"] < K:
            groups.setdefault(r["prompt_id"], []).append({**r, **verdicts[r["rollout_id"]]})
    grades, rows = [], []
    for prompt, group in sorted(groups.items()):
        successes = sum(r["correct"] for r in group)
        unjudged = sum(r["status"] in ("timeout", "error", "gold_bad") for r in group)
        longest = max(r["prompt_length"] + r["length"] for r in group)
        if len(group) < K:
            reason = "incomplete_group"
        elif unjudged:
            reason = "unjudged"
        elif successes == len(group):
            reason = "easy"
        elif successes == 0:
            reason = "no_verified_trace"
        else:
            reason = "rl" if longest <= 8192 else "too_long"
        grades.append(
            {
                "prompt_id": prompt,
                "policy": group[0]["policy"],
                "k": len(group),
                "successes": successes,
                "unjudged": unjudged,
                "reason": reason,
            }
        )
        if reason != "rl":
            continue
        rewards = [r["reward"] for r in group]
        mean, std = fmean(rewards), stdev(rewards)
        for r in sorted(group, key=lambda r: r["sample"]):
            advantage = 0.0 if max(rewards) == min(rewards) else (r["reward"] - mean) / (std + EPS)
            rows.append({**r, "advantage": advantage, "w_sft": 0.0, "w_grpo": 1.0, "w_gal": 1.0})
    pq.write_table(pa.Table.from_pylist(grades), out / "grades.parquet")
    pq.write_table(pa.Table.from_pylist(rows), out / "rows.parquet")
    reasons = Counter(g["reason"] for g in grades)
    return answer(dict(reasons), sum(g["successes"] for g in grades), sum(abs(r["advantage"]) for r in rows))


CONTESTANTS: dict[str, Callable[[Path, Path], Answer]] = {
    "stage": stage, "sql": sql, "polars": with_polars, "pandas": with_pandas, "loop": loop,
}  # fmt: skip


def answer(reasons: dict[str, int], successes: Any, advantages: Any) -> Answer:
    return {
        **{f"reason {k}": int(v) for k, v in reasons.items()},
        "successes": int(successes),
        "advantages": round(float(advantages), 3),
    }


def answered(run: Path) -> Answer:
    """What the stage wrote."""
    from pipeline.store import connect

    con = connect(run)
    reasons = dict(con.sql("select reason, count(*) from grades group by all").fetchall())
    (successes,) = con.sql("select sum(successes) from grades").fetchall()[0]
    (advantages,) = con.sql("select sum(abs(advantage)) from shards").fetchall()[0]
    return answer(reasons, successes, advantages)


# ---------------------------------------------------------------- the race
def timed(name: str, run: Path) -> dict[str, Any]:
    """One contestant in a fresh process, its imports before the clock."""
    with tempfile.TemporaryDirectory(dir=run.parent) as out:
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.grade", "--contestant", name, str(run), out]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def contest(name: str, run: Path, out: Path) -> None:
    import duckdb
    import polars
    import pyarrow.parquet

    if name == "pandas":
        import pandas  # noqa: F401
    if name == "stage":
        import transformers.models.llama.tokenization_llama  # noqa: F401

        import pipeline.stages.grade  # noqa: F401
    assert all((duckdb, polars, pyarrow))
    began, busy = time.perf_counter(), time.process_time()
    got = CONTESTANTS[name](run, out)
    took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - busy, "peak_mb": peak_mb()}
    print(json.dumps({**took, "answer": answered(run) if name == "stage" else got}))


def race(rows: int, run: Path, names: list[str], repeat: int) -> dict[str, Any]:
    """Makes the run and lets each contestant run `repeat` times, taking turns; medians of time, the most of memory."""
    from tests.bench.made_run import make

    began = time.perf_counter()
    make(run, rows, memory_mb=MEMORY_MB_OF_DUCKDB if rows > ROWS else 384)
    print(f"{rows:,} rows made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            turns[name].append(timed(name, run))
            print(f"{name}: {turns[name][-1]}", file=sys.stderr)
    scale = {"loop": rows / min(rows, LOOP_ROWS)}
    return {
        name: {
            "seconds": median(t["seconds"] for t in each) * scale.get(name, 1),
            "cpu_s": median(t["cpu_s"] for t in each) * scale.get(name, 1),
            "peak_mb": max(t["peak_mb"] for t in each),
            "answer": each[0]["answer"],
        }
        for name, each in turns.items()
    }


def stream_of_lists(folder: Path) -> dict[int, dict[str, Any]]:
    """The stage where rows have token lists: time, memory, and bytes of lists that it moved."""
    from pipeline.store import connect
    from tests.bench.made_run import make

    out = {}
    for rows in LISTS:
        make(folder / f"lists-{rows}", rows, TOKENS)
        one = timed("stage", folder / f"lists-{rows}")
        query = "select sum(4 * len(prompt_tokens) + 8 * len(tokens)) / 1e6 from shards"
        (megabytes,) = connect(folder / f"lists-{rows}").sql(query).fetchall()[0]
        out[rows] = {**one, "list_mb": megabytes}
    return out


def ratios(found: dict[str, Any]) -> dict[str, float]:
    got = {}
    for name in FLOORS:
        pair, what = name.split(", ")
        a, b = pair.split(" / ")
        if b in found:
            key = "seconds" if what == "time" else "peak_mb"
            got[name] = found[a][key] / found[b][key]
    return got


def missed(rows: int, found: dict[str, Any], got: dict[str, float]) -> list[str]:
    """What is over its floor."""
    out = [f"{name} is {got[name]:.2f}, at most {FLOORS[name]:.2f}" for name in got if got[name] > FLOORS[name]]
    for name in ("polars", "pandas"):
        if name in found and found[name]["answer"] != found["stage"]["answer"]:
            out.append(f"{name} made {found[name]['answer']}, the stage {found['stage']['answer']}")
    if rows in MEMORY_MB and found["stage"]["peak_mb"] > MEMORY_MB[rows]:
        out.append(f"the stage held {found['stage']['peak_mb']:.0f} MB at {rows:,} rows, at most {MEMORY_MB[rows]}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=lambda s: int(s.replace("_", "").replace(",", "")), default=ROWS)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--keep", type=Path, help="make the runs here and leave them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, run, out = options.contestant
        contest(name, Path(run), Path(out))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        names = [n for n in CONTESTANTS if n in options.only]
        small = min(options.rows, ROWS)
        large = options.rows > ROWS
        results = {small: race(small, folder / str(small), ["stage"] if large else names, options.repeat)}
        if large:
            results[options.rows] = race(options.rows, folder / str(options.rows), ["stage"], options.repeat)
        lists = stream_of_lists(folder)
    problems: list[str] = []
    for rows, found in results.items():
        print(f"{rows:,} rows")
        for name, one in found.items():
            scaled = f" (on {LOOP_ROWS:,} rows, scaled)" if name == "loop" else ""
            memory = "" if name == "loop" else f"{one['peak_mb']:8.0f} MB"
            print(f"  {name:8}{one['seconds']:8.1f} s{one['cpu_s']:8.1f} s of processor{memory}{scaled}")
        got = ratios(found) if "stage" in found else {}
        for name, value in got.items():
            print(f"  {name}: {value:.2f}")
        problems += missed(rows, found, got) if "stage" in found else []
    if large:
        growth = results[options.rows]["stage"]["seconds"] / results[small]["stage"]["seconds"] / (options.rows / small)
        print(f"time at {options.rows:,} rows is {growth:.2f} of linear")
        problems += [f"time grows {growth:.2f} of linear, at most {LINEAR}"] if growth > LINEAR else []
    for rows, one in lists.items():
        rate = one["list_mb"] / one["seconds"]
        print(
            f"{rows:,} rollouts of {TOKENS} tokens: {one['list_mb']:.0f} MB of lists to shards in {one['seconds']:.1f} s",
            end="",
        )
        print(f" ({rate:.0f} MB/s, the whole stage), {one['peak_mb']:.0f} MB held")
    streams = lists[LISTS[1]]["peak_mb"] / lists[LISTS[0]]["peak_mb"]
    problems += [f"memory grows {streams:.2f} times with 3 times the lists, at most {STREAMS}"] if streams > STREAMS else []
    if options.json:
        print(json.dumps(results))
    for problem in problems:
        print(f"missed: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
