"""From what the user typed (a recipe or a run folder, overrides) to a run that stages can work on."""

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from pipeline.policy import policy_id
from pipeline.store import Partition, partition, partitions
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Context:
    """One run: its folder and its recipe, as resolved."""

    run: Path
    recipe: Recipe

    @cached_property
    def base_policy(self) -> str:
        """Content id of the recipe's base policy."""
        return policy_id(self.recipe.policy.model)

    def part(self, table: str, **keys: str | int | None) -> Partition:
        return partition(self.run, table, keys)

    def round_end(self, round: int) -> Manifest | None:
        """The manifest of a finished round of training."""
        return self.part("checkpoints", round=round).manifest()

    def policy_of(self, round: int) -> tuple[Path, str]:
        """Folder and content id of the policy that a round samples: the base, or what the round before ended with.

        UserError if that round is not trained, or ended with the mean with the base (train.base_weight), where a run ends.
        """
        if round == 0:
            return self.recipe.policy.model, self.base_policy
        last = self.recipe.rounds - 1
        if round > last and self.recipe.train.base_weight > 0:
            raise UserError(
                f"{self.run}: round {round} is past the run's last, {last}, which with train.base_weight ends with the mean with the base "
                f"policy; no round goes on from that. Set rounds to {round + 1} or more: round {last} is then trained again, without the mean"
            )
        end = self.round_end(round - 1)
        if end is None:
            raise UserError(
                f"{self.run}: round {round} samples the checkpoint that round {round - 1} ended with, and there is none. "
                f"Run `dypo train {self.run} --round {round - 1}` first"
            )
        return self.checkpoint(round - 1, int(end.facts["steps"]))

    def checkpoint(self, round: int, step: int) -> tuple[Path, str]:
        """Folder and content id of a checkpoint; (round 0, step 0) is the base policy."""
        if (round, step) == (0, 0):
            return self.recipe.policy.model, self.base_policy
        part = self.part("checkpoints", round=round, step=step)
        manifest = part.manifest()
        if manifest is None:
            have = ", ".join(p.label for p in partitions(self.run, "checkpoints") if len(p.keys) == 2) or "none"
            raise UserError(f"{part.folder}: no such checkpoint. There are: {have}")
        return part.folder, str(manifest.facts["policy"])

    def verify_policy(self, folder: Path) -> None:
        """Hashes a checkpoint of ours against its manifest; the base policy's content id is its own check."""
        for part in partitions(self.run, "checkpoints"):
            if part.folder == folder:
                part.verify()

    def trained_rounds(self) -> int:
        """Rounds of training finished, counted from 0 without a gap."""
        n = 0
        while self.round_end(n) is not None:
            n += 1
        return n

    def newest_round(self) -> int:
        """The newest round that has rollouts."""
        rounds = [int(dict(p.keys)["round"]) for p in partitions(self.run, "rollouts")]
        if not rounds:
            raise UserError(f"{self.run}: no rollouts yet. Run `dypo generate {self.run}` first")
        return max(rounds)

    def next_round(self) -> int:
        """The round whose rollouts are due: the one after the last trained round, within the recipe's rounds."""
        return min(self.trained_rounds(), self.recipe.rounds - 1)


def load(target: Path, overrides: list[str] | None = None) -> Context:
    """A recipe file or a run folder, with `key=value` overrides. Relative paths are taken from the working directory."""
    path = target / "recipe.toml" if target.is_dir() else target
    if not path.exists():
        what = "a folder without a recipe.toml, so not a run" if target.is_dir() else "no such file"
        raise UserError(f"{target}: {what}. Give a recipe (recipes/tiny.toml) or a run folder (runs/demo)")
    data = with_included(path)
    for item in overrides or []:
        _set(data, item)
    ctx = of_data(data, str(path))
    run = target.resolve() if target.is_dir() else ctx.run
    return Context(run, ctx.recipe.model_copy(update={"run": run}))


def of_data(data: dict[str, Any], where: str) -> Context:
    """A recipe that was read already; `where` it is from stands in errors."""
    recipe = parse_recipe(_absolute(parse_recipe(data, where)), where)
    return Context(recipe.run, recipe)


def with_included(path: Path) -> dict[str, Any]:
    """A recipe file as data, laid over the files that its `include` names (paths from its own folder).

    Tables merge key by key and lists of named tables by `name`, so that a recipe changes one key of an included suite by naming the
    suite and the key. The recipe's own values stand; two included files that give one key different values are a UserError.
    """
    own = _toml(path)
    names = own.pop("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{path}: include: expected a list of files, found {names!r}. Write include = ["suites/aime24.toml"]'
        )
    under: dict[str, Any] = {}
    for name in names:
        file = path.parent / name
        if not file.is_file():
            near = ", ".join(sorted(p.name for p in file.parent.glob("*.toml"))) or "none"
            raise UserError(f"{path}: include: {file} is no file. TOML files in that folder: {near}. Correct the name")
        included = _toml(file)
        if "include" in included:
            raise UserError(f"{file}: an included file cannot include others. Name them in {path}, and remove its `include`")
        under = _laid_over(under, included, refuse=f"{path}: include: {file} and a file before it")
    return _laid_over(under, own)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid TOML: {e}") from None


def _laid_over(under: Any, over: Any, key: str = "", refuse: str | None = None) -> Any:
    """`over`, with what only `under` has. refuse: who to name when both say something different."""
    if isinstance(under, dict) and isinstance(over, dict):
        both = {k: _laid_over(under[k], over[k], f"{key}.{k}" if key else k, refuse) for k in under if k in over}
        return {**under, **over, **both}
    if (a := _named(under)) is not None and (b := _named(over)) is not None:
        return list(_laid_over(a, b, key, refuse).values())
    if refuse is not None and under != over:
        raise UserError(
            f"{refuse} both give {key}: {under!r} and {over!r}. Leave one file out, or change the key in one of them"
        )
    return over


def _named(value: Any) -> dict[str, Any] | None:
    """A list of tables by their names; None if it is no such list."""
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) and "name" in v for v in value):
        return None
    named = {v["name"]: v for v in value}
    return named if len(named) == len(value) else None


def resolved(ctx: Context) -> str:
    """The recipe as it stands in RUN/recipe.toml."""
    return tomli_w.dumps(ctx.recipe.model_dump(mode="json", exclude_none=True))


def _set(data: dict[str, Any], item: str) -> None:
    """Applies one `dotted.key=value`; the value is TOML, or a plain string if it is not. Lists are indexed by number or name."""
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise UserError(f"--set {item}: expected dotted.key=value, for example --set grade.easy_max_failures=1")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            match = [v for i, v in enumerate(node) if part in (str(i), v.get("name"))]
            if not match:
                raise UserError(f"--set {item}: no entry {part!r} in that list")
            node = match[0]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise UserError(f"--set {item}: {part!r} stands below a value, not a table")
    if not isinstance(node, dict):
        raise UserError(f"--set {item}: {last!r} does not name a key of a table")
    node[last] = value


def _absolute(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data with every Path absolute, so that a run folder can be used from any working directory."""

    def walk(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.expanduser().absolute())
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items() if v is not None}
        return [walk(v) for v in value] if isinstance(value, list | tuple) else value

    def absolute(spec: str) -> str:
        """`path/to/file.py:function` with its path absolute; the names of built-ins have no colon."""
        path, colon, name = spec.rpartition(":")
        return str(Path(path).expanduser().absolute()) + colon + name if colon else spec

    data = walk(recipe.model_dump())
    for verifier in data["score"]["verifiers"].values():
        if "function" in verifier:
            verifier["function"] = absolute(verifier["function"])
    for teacher in data["teachers"]:
        if "program" in teacher["engine"]:
            teacher["engine"]["program"] = absolute(teacher["engine"]["program"])
    return data
