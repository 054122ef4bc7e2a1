"""A user's own function, brought unchanged from TRL or verl; which of the two is read off its parameter names.

- TRL: `f(completions, solution, **columns) -> list[float | None]`. Called with one completion at a time and, by name,
  those of these columns that it takes: prompts, solution, answer (both the gold answer), source,
  and every key of the prompt's metadata. Rewards that compare completions with each other are left
  out: a verdict is about one text.
- verl: `compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float}`.

None, NaN, infinity and whatever is no number become status error, never a reward of zero.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.scorers.base import Item, Verdict, error, judged
from schemas.errors import UserError
from schemas.scorers import UserScorer

VERSION = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """A user's function and how to call it."""

    call: Callable[..., Any]
    style: Literal["trl", "verl"]
    names: frozenset[str]
    takes_all: bool  # it has **columns
    as_messages: bool


_loaded: dict[tuple[str, str], Loaded] = {}  # by function and form of completions; lives in a worker


def score(item: Item, config: UserScorer) -> Verdict:
    loaded = load(config)
    value = _trl(loaded, item) if loaded.style == "trl" else _verl(loaded, item)
    if value is None:
        return error("the function returned None")
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return error(f"the function returned {value!r:.100}, not a number")
    reward = float(value)
    if not math.isfinite(reward):
        return error(f"the function returned {reward}")
    return judged(reward >= config.correct_at, None, reward=reward)


def source_file(config: UserScorer) -> Path:
    return Path(config.function.rpartition(":")[0])


def source_hash(config: UserScorer) -> str:
    """sha256 of the function's file, so that an edited function is another verifier."""
    try:
        return hashlib.sha256(source_file(config).read_bytes()).hexdigest()
    except OSError as reason:
        raise UserError(f"user function {config.function}: cannot read the file: {reason}") from None


def load(config: UserScorer) -> Loaded:
    """Import the file and read the signature. UserError says what is wrong with either."""
    key = (config.function, config.completions)
    if key not in _loaded:
        _loaded[key] = _load(config)
    return _loaded[key]


def _load(config: UserScorer) -> Loaded:
    where = f"user function {config.function}"
    path, name = source_file(config), config.function.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}")
    sys.path.append(str(path.resolve().parent))  # its neighbours can be imported, as when run as a script
    module_name = f"_dypo_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as reason:
        del sys.modules[module_name]
        raise UserError(f"{where}: importing {path} failed: {type(reason).__name__}: {reason}") from None
    function = getattr(module, name, None)
    if function is None:
        defined = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise UserError(f"{where}: {path} has no {name}; its functions: {', '.join(defined) or 'none'}")
    if not callable(function):
        raise UserError(f"{where}: {name} is a {type(function).__name__}, not a function")
    return _described(function, where, config)


def _described(function: Callable[..., Any], where: str, config: UserScorer) -> Loaded:
    if inspect.iscoroutinefunction(function):
        raise UserError(f"{where}: async functions are not supported; wrap it in a plain one")
    parameters = inspect.signature(function).parameters
    named = frozenset(
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    if "completions" in named:
        style = "trl"
    elif {"solution_str", "ground_truth"} <= named:
        style = "verl"
    else:
        raise UserError(
            f"{where}: expected TRL's f(completions, solution, **columns) or verl's"
            f" compute_score(data_source, solution_str, ground_truth, extra_info),"
            f" found parameters ({', '.join(parameters)})"
        )
    as_messages = config.completions == "messages" or (config.completions == "auto" and _mentions_content(function))
    return Loaded(function, style, named, takes_all, as_messages)


def _mentions_content(function: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return False
    return '"content"' in source or "'content'" in source


def _trl(loaded: Loaded, item: Item) -> Any:
    def chat(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if loaded.as_messages else text

    columns = {
        **{str(key): [value] for key, value in (item.metadata or {}).items()},
        "prompts": [chat("user", item.prompt)],
        "completions": [chat("assistant", item.text)],
        "solution": [item.answer],
        "answer": [item.answer],
        "source": [item.source],
    }
    values = loaded.call(**_taken(loaded, columns))
    if not isinstance(values, (list, tuple)) or len(values) != 1:
        raise TypeError(f"the function returned {values!r:.100}, expected a list with one value")
    return values[0]


def _verl(loaded: Loaded, item: Item) -> Any:
    row = item.metadata or {}
    columns = {
        "data_source": row.get("data_source", item.source),
        "solution_str": item.text,
        "ground_truth": item.answer,
        "extra_info": row.get("extra_info", row),
    }
    value = loaded.call(**_taken(loaded, columns))
    if isinstance(value, dict):
        if "score" not in value:
            raise TypeError(f"the function returned a dict without 'score': {value!r:.100}")
        return value["score"]
    return value


def _taken(loaded: Loaded, columns: dict[str, Any]) -> dict[str, Any]:
    return columns if loaded.takes_all else {k: v for k, v in columns.items() if k in loaded.names}
