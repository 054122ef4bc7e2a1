"""What a study consists of: stems, trials and cells, where each lies, and the recipe that it is a run of.

    stems/WORLD/BASE/SEED               what does not depend on the method: problems, traces, the base's rollouts, their verdicts and evals
    tuning/WORLD/METHOD/TRIAL           one trial, on the study's tuning base and seed
    cells/WORLD/BASE/METHOD/SEED        one result

Nothing here reads a run: a study file says all of it. It leaves out in what order they are made, and how.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.context import Context, of_data
from schemas.errors import UserError
from schemas.model import merge
from schemas.recipe import Suite
from schemas.study import Arm, Study, World, parse_study


@dataclass(frozen=True)
class Stem:
    """What the runs of one world, base and seed have in common."""

    world: str
    base: str
    seed: int

    @property
    def label(self) -> str:
        return f"stems/{self.world}/{self.base}/{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One run of one method; a trial if it has a number."""

    world: str
    base: str
    method: str
    seed: int
    trial: int | None = None

    @property
    def label(self) -> str:
        if self.trial is not None:
            return f"tuning/{self.world}/{self.method}/{self.trial}"
        return f"cells/{self.world}/{self.base}/{self.method}/{self.seed}"

    @property
    def stem(self) -> Stem:
        return Stem(self.world, self.base, self.seed)


Run = Stem | Cell


@dataclass(frozen=True)
class Plan:
    """A study file, read, with its worlds' recipes as data."""

    study: Study
    recipes: Mapping[str, dict[str, Any]]
    where: str
    reached: dict[Cell, float] = field(
        default_factory=dict
    )  # of trials that are known to be finished: what they are judged by

    @property
    def folder(self) -> Path:
        return self.study.folder

    def world(self, name: str) -> World:
        return next(w for w in self.study.worlds if w.name == name)

    def arm(self, name: str) -> Arm:
        return next(m for m in self.study.methods if m.name == name)

    def cells(self) -> Iterator[Cell]:
        """The results, seed by seed, so that a study that is cut off has something of every method."""
        for seed in self.study.seeds:
            for world in self.study.worlds:
                for base in world.bases:
                    for method in self.study.methods:
                        yield Cell(world.name, base, method.name, seed)

    def trials(self, world: str, method: str) -> list[Cell]:
        """The trials that a method's setting in a world is chosen by; none where there is nothing to choose."""
        arm = self.arm(method)
        by, tuning = arm.tuned_as or arm.name, self.study.tuning
        count = len(self.study.trials_of(arm))
        return [Cell(world, tuning.base, by, tuning.seed, n) for n in range(count)] if count > 1 else []

    # ------------------------------------------------------------ recipes
    def context(self, run: Run, trial: int | None = None) -> Context:
        """The run with its recipe. `trial`: which trial's setting a cell takes (its own, if it is a trial)."""
        data = self._of_stem(run) if isinstance(run, Stem) else self._of_cell(run, run.trial if trial is None else trial)
        return of_data(data, f"{self.where}: {run.label}")

    def _of_stem(self, run: Stem | Cell) -> dict[str, Any]:
        """The world's recipe on one base and seed."""
        world = self.world(run.world)
        of_run = {
            "name": run.label.replace("/", "-"),
            "run": str(self.folder / run.label),
            "seed": run.seed,
            "policy": {"model": str(world.bases[run.base])},
        }
        data = merge(self.recipes[run.world], of_run)
        tuned = self.study.tuning.suite
        is_trial = run.seed == self.study.tuning.seed
        suites = [s for s in data.get("eval", {}).get("suites", []) if not is_trial or s["name"] == tuned]
        if tuned not in [s["name"] for s in suites]:
            raise UserError(f"{self.where}: tuning.suite: {world.recipe} has no eval suite '{tuned}'")
        return merge(data, {"eval": {"suites": suites}})

    def _of_cell(self, cell: Cell, trial: int | None) -> dict[str, Any]:
        arm = self.arm(cell.method)
        trials = self.study.trials_of(arm)
        data = merge(self._of_stem(cell), arm.set)
        data["train"] = {**data["train"], "method": {**arm.method, **trials[trial or 0]}}
        if arm.teachers is not None:
            there = [t["name"] for t in data.get("teachers", [])]
            if missing := [t for t in arm.teachers if t not in there]:
                raise UserError(
                    f"{self.where}: methods.{arm.name}.teachers: world '{cell.world}' has no teacher '{missing[0]}' ({', '.join(there)})"
                )
            data["teachers"] = [t for t in data["teachers"] if t["name"] in arm.teachers]
        return data

    def suites(self, world: str) -> list[Suite]:
        """The eval suites that results are reported on."""
        suites = self.context(Stem(world, next(iter(self.world(world).bases)), self.study.seeds[0])).recipe.eval.suites
        return [s for s in suites if s.name != self.study.tuning.suite]


def read(path: Path) -> Plan:
    """The study file and the recipes that it names. Relative paths in them are taken from the working directory."""
    study = parse_study(_toml(path), str(path))
    study = study.model_copy(update={"folder": study.folder.expanduser().absolute()})
    plan = Plan(study, {w.name: _toml(w.recipe) for w in study.worlds}, str(path))
    for world in study.worlds:
        for base, policy in world.bases.items():
            if not (policy / "config.json").exists():
                raise UserError(f"{path}: worlds.{world.name}.bases.{base}: {policy}: no policy there (no config.json)")
        for method in study.methods:  # a recipe that is not valid is told before anything runs
            plan.context(Cell(world.name, next(iter(world.bases)), method.name, study.seeds[0]))
    return plan


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}. Paths in a study are taken from the working directory") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid TOML: {e}") from None
