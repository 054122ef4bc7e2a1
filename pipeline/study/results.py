"""What a study found: SQL over the finished results, and comparisons of methods pair by pair.

One idea: the unit is the run. Two methods on one world, base and seed began with the same stored rows, so the datum is the
difference of the two runs' values; pipeline/comparison.py says what is claimed of such differences. Seeds of one base are
alike, so a claim is about these bases; Holm's correction is over all comparisons of one table that concern one measure.
Results that are not there are counted, and a pair of which one is missing is no pair. It leaves out how anything looks.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.comparison import PairedTest, holm, paired_test
from pipeline.store import ask, named_views, sql
from pipeline.study.layout import Cell, Plan
from schemas.recipe import Suite

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
Unit = tuple[str, int]  # base, seed
Values = dict[str, dict[Unit, float]]  # of one measure in one world: method -> unit -> value
MEAN_OUTSIDE = "out of distribution"


@dataclass(frozen=True)
class Compared:
    """One method against a reference on one measure; `adjusted` is p after Holm's correction."""

    test: PairedTest
    adjusted: float


@dataclass
class Results:
    """Everything that the report says, asked of the finished results' tables."""

    plan: Plan
    cells: Sequence[Cell]

    @cached_property
    def con(self) -> "duckdb.DuckDBPyConnection":
        runs = {cell.label: self.plan.folder / cell.label for cell in self.cells}
        con = named_views(runs, ("evals", "metrics", "rollouts"))
        budgets = {w.name: w.rollout_tokens for w in self.plan.study.worlds}
        rows = [
            {
                "run": c.label,
                "world": c.world,
                "base": c.base,
                "method": c.method,
                "seed": c.seed,
                "rollout_tokens": budgets[c.world],
            }
            for c in self.cells
        ]
        con.register("cells", pa.Table.from_pylist(rows, schema=CELLS))
        return con

    def rows(self, query: str, **parameters: Any) -> list[Row]:
        """All rows of sql/study/QUERY.sql."""
        return ask(self.con, sql(f"study/{query}"), **parameters).to_pylist()

    # ------------------------------------------------------------ measures
    def measures(self, world: str) -> list[str]:
        """What a world's results are reported on: each suite, and the mean of those out of distribution if there are several."""
        suites = self.plan.suites(world)
        outside = [s for s in suites if s.out_of_distribution]
        return [s.name for s in suites] + ([MEAN_OUTSIDE] if len(outside) > 1 else [])

    def values(self, world: str, rows: Iterable[Row], column: str = "value") -> dict[str, Values]:
        """Of `finals` or `at_budget`: measure -> method -> (base, seed) -> value."""
        found: dict[str, Values] = {m: defaultdict(dict) for m in self.measures(world)}
        for row in rows:
            if row["world"] == world and row["suite"] in found:
                found[row["suite"]][row["method"]][row["base"], row["seed"]] = row[column]
        if MEAN_OUTSIDE in found:
            found[MEAN_OUTSIDE] = _mean(found, self.plan.suites(world))
        return found

    def compared(self, values: Values) -> dict[tuple[str, str], Compared]:
        """(method, reference) -> the comparison, where there is a pair; corrected over all of them."""
        tests = {}
        for reference in self.plan.study.references:
            for method in (m.name for m in self.plan.study.methods):
                pairs = sorted(values.get(method, {}).keys() & values.get(reference, {}).keys())
                if method != reference and pairs:
                    tests[method, reference] = paired_test([values[method][u] - values[reference][u] for u in pairs])
        adjusted = holm([t.p for t in tests.values()])
        return {key: Compared(test, p) for (key, test), p in zip(tests.items(), adjusted, strict=True)}

    def wanted(self, world: str) -> int:
        """Results that each method should have in a world."""
        return len(self.plan.world(world).bases) * len(self.plan.study.seeds)

    def spent(self) -> dict[tuple[str, str], Row]:
        """(world, method) -> mean updates and tokens of a result."""
        found: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows("spent"):
            found[row["world"], row["method"]].append(row)
        names = ("updates", "rollout_tokens", "trace_tokens", "rl_tokens")
        return {key: {name: fmean(r[name] for r in rows) for name in names} for key, rows in found.items()}


CELLS = pa.schema({
    "run": pa.string(), "world": pa.string(), "base": pa.string(), "method": pa.string(), "seed": pa.int64(),
    "rollout_tokens": pa.int64(),
})  # fmt: skip


def interval(values: Iterable[float]) -> PairedTest | None:
    """The mean with its interval over results; None for none."""
    listed = list(values)
    return paired_test(listed) if listed else None


def _mean(found: Mapping[str, Values], suites: Sequence[Suite]) -> Values:
    """The mean of the suites out of distribution, for units that have all of them."""
    outside = [found[s.name] for s in suites if s.out_of_distribution]
    out: Values = defaultdict(dict)
    for method in outside[0]:
        units = set.intersection(*(set(values[method]) for values in outside))
        out[method] = {u: fmean(values[method][u] for values in outside) for u in units}
    return out
