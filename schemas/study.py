"""A study file: methods x seeds x base policies x worlds, each combination one run of a recipe. Unknown keys are errors.

One idea: a cell is a recipe. A world gives it, a base and a seed are set in it, a method lays its own keys over it, and the
learning rate comes from trials on a base and a seed of their own. So whatever a study did, `dypo run` can do again.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from schemas.errors import UserError
from schemas.model import Model
from schemas.recipe import NAME, explained

Trial = dict[str, float]


class World(Model):
    """One world: a recipe, and the base policies that its runs begin from."""

    name: str = Field(pattern=NAME)
    recipe: Path
    bases: dict[str, Path] = Field(min_length=1, description="base policies by name: Hugging Face folders")
    rollout_tokens: int | None = Field(
        default=None,
        ge=1,
        description="budget of the token-matched table: what a run may have generated when it is evaluated for it",
    )


class Tuning(Model):
    """Trials: for each world and method, the same number of them, judged on a split that no table reports."""

    base: str = Field(description="the base policy of the trials, by name")
    seed: int = Field(description="their seed, none of the study's")
    suite: str = Field(description="the recipe's eval suite that they are judged by; final tables leave it out")
    trials: list[Trial] = Field(min_length=1, description="keys of train.method, for example { lr = 3e-4 }")


class Arm(Model):
    """One method: what is laid over the world's recipe."""

    name: str = Field(pattern=NAME)
    method: dict[str, Any] = Field(description="the recipe's train.method, but for what the trials set")
    teachers: list[str] | None = Field(default=None, min_length=1, description="of the recipe's; default: all")
    set: dict[str, Any] = Field(default={}, description="other keys of the recipe, as tables")
    trials: list[Trial] | None = Field(default=None, description="instead of tuning.trials; as many")
    tuned_as: str | None = Field(
        default=None, description="the method whose chosen trial this one takes, instead of its own"
    )


class Grid(Model):
    """Two recipe keys that the methods vary: the report lays their results out as rows and columns."""

    rows: str = Field(description="dotted, for example train.method.alpha")
    columns: str


class Probe(Model):
    """`dypo probe variance` on one method's finished runs (paper Eq. 19)."""

    method: str
    seed: int
    rounds: list[int] = Field(min_length=1)


class Study(Model):
    """A whole study. Its cells are FOLDER/cells/WORLD/BASE/METHOD/SEED; studies with one folder share them."""

    name: str = Field(pattern=NAME)
    title: str
    folder: Path
    seeds: list[int] = Field(min_length=1)
    worlds: list[World] = Field(min_length=1)
    tuning: Tuning
    methods: list[Arm] = Field(min_length=1)
    references: list[str] = Field(default=[], description="methods that every other one is compared with, pair by pair")
    grid: Grid | None = None
    probe: Probe | None = None

    @field_validator("seeds", "references")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value!r} is given twice")
        return values

    @model_validator(mode="after")
    def _names_agree(self) -> "Study":
        methods = [m.name for m in self.methods]
        for what, names in (("worlds", [w.name for w in self.worlds]), ("methods", methods)):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what}: the name '{name}' is given twice; names are folders")
        for world in self.worlds:
            if self.tuning.base not in world.bases:
                raise ValueError(
                    f"tuning.base: '{self.tuning.base}' is not among the bases of world '{world.name}' ({', '.join(world.bases)})"
                )
        if self.tuning.seed in self.seeds:
            raise ValueError(
                f"tuning.seed: {self.tuning.seed} is one of seeds, {self.seeds}; trials that are also results would be favoured"
            )
        for method in self.methods:
            self._trials_agree(method)
        asked = [("references", r) for r in self.references] + ([("probe.method", self.probe.method)] if self.probe else [])
        for key, name in asked:
            if name not in methods:
                raise ValueError(f"{key}: no method is named '{name}'; there are {', '.join(methods)}")
        if self.probe and self.probe.seed not in self.seeds:
            raise ValueError(f"probe.seed: {self.probe.seed} is not one of seeds, {self.seeds}")
        return self

    def _trials_agree(self, method: Arm) -> None:
        where, count = f"methods.{method.name}", len(self.tuning.trials)
        if method.tuned_as is not None:
            others = [m.name for m in self.methods if m.tuned_as is None]
            if method.trials is not None:
                raise ValueError(f"{where}: trials and tuned_as exclude each other")
            if method.tuned_as not in others:
                raise ValueError(
                    f"{where}.tuned_as: '{method.tuned_as}' is not a method with trials of its own ({', '.join(others)})"
                )
        if method.trials is not None and len(method.trials) != count:
            raise ValueError(
                f"{where}.trials: {len(method.trials)} of them, but tuning.trials has {count}: every method gets the same number"
            )
        for trial in self.trials_of(method):
            if both := sorted(trial.keys() & method.method.keys()):
                raise ValueError(f"{where}: {both[0]} is set by the method and by its trials; leave it to the trials")

    def trials_of(self, method: Arm) -> list[Trial]:
        """The trials that a method's setting is chosen from."""
        source = next((m for m in self.methods if m.name == method.tuned_as), method)
        return self.tuning.trials if source.trials is None else source.trials


def parse_study(data: dict[str, Any], where: str) -> Study:
    """A Study from a TOML tree. UserError names the file, the key, what was expected and the nearest known key."""
    try:
        return Study.model_validate(data)
    except ValidationError as e:
        raise UserError(f"{where}: the study is not valid\n" + "\n".join(explained(e, Study))) from None
