"""Engine `program`: a teacher that is a Python function: tiny-world solvers, worked solutions, the user's own.

A user's function lives in `path/to/file.py:function` and is called as `function(prompt, rng)`: the text of
the last user message, and a `random.Random` of this sample alone. Parameters named `answer`,
`messages`, `metadata`, `prompt_id` or `sample` are filled in too (with `**row`, all of them). It returns the
trace, or None where it has none; an exception is a Failure of that sample alone.

The text is a function of (seed, prompt, sample), so a repeated run gives the same rows.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.engines.base import Ask, Failure, Finished, Sample
from schemas.errors import UserError
from schemas.ids import seed_from

FLUSH_ROWS = 256  # a list of samples is one part file: at most so many rows,
FLUSH_S = 5.0  # or so many seconds of a slow function's work
TINY = "tiny."
WORKED = "worked_solution"
ROW = ("answer", "messages", "metadata", "prompt_id", "sample")

Call = Callable[[Ask, int, random.Random], str | None]


class ProgramTeacher:
    """Runs one program for every sample; `complete` is False where it may have no trace for a prompt."""

    name = "program"
    seeded = True
    note = ""

    def __init__(self, program: str, who: str = "program") -> None:
        self.program, self._who = program, who
        self._path = user_file(program, who)
        self.complete = program.startswith(TINY)
        self._call = self._load()

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """Yields lists of a few seconds' work, in the order of asks and samples."""
        if self.program == WORKED and asks and not any(_solution(ask) for ask in asks):
            raise UserError(
                f"{self._who}: program '{WORKED}' reads the worked solution in a prompt's metadata (`solution`), and "
                f"none of the {len(asks)} prompts has one. Give the source a `solution` column, use a "
                "reasoning-gym task that carries one (gsm_symbolic), or name another program"
            )
        batch: list[Sample | Failure] = []
        began = time.monotonic()
        for ask in asks:
            for sample in ask.samples:
                if (ask.prompt_id, sample) in finished:
                    continue
                if (made := self._one(ask, sample)) is not None:
                    batch.append(made)
                if len(batch) >= FLUSH_ROWS or (batch and time.monotonic() - began >= FLUSH_S):
                    yield batch
                    batch, began = [], time.monotonic()
        if batch:
            yield batch

    def _one(self, ask: Ask, sample: int) -> Sample | Failure | None:
        seed = seed_from(ask.seed, sample)
        try:
            text = self._call(ask, sample, random.Random(seed))
            if isinstance(text, str):
                text.encode()  # half a character could not be written
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            why = f"{self.program}: {type(e).__name__}: {e} ({Path(at.filename).name}, line {at.lineno})"
            return Failure(ask.prompt_id, sample, why)
        if text is None:
            return None
        if not isinstance(text, str) or not text.strip():
            found = "an empty text" if isinstance(text, str) else f"{type(text).__name__} {text!r:.80}"
            return Failure(ask.prompt_id, sample, f"{self.program}: expected a text (or None), it returned {found}")
        sampling = json.dumps({"seed": seed})
        return Sample(ask.prompt_id, sample, text, "stop", model=self.program, sampling=sampling)

    def _load(self) -> Call:
        if self._path is not None:
            return _user_call(self.program, self._path, self._who)
        if self.program == WORKED:
            return lambda ask, sample, rng: _solution(ask)
        from pipeline.tiny import TEACHERS

        teacher = TEACHERS[self.program.removeprefix(TINY)]
        return lambda ask, sample, rng: teacher(ask.messages[-1]["content"], rng)


def user_file(program: str, who: str = "program") -> Path | None:
    """The file of a `path/to/file.py:function`, None for a built-in; UserError if it is neither."""
    path, colon, function = program.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise UserError(
                f"{who}: {path}: no such file, for program '{program}'. Correct the path, which is "
                "taken from the working directory"
            )
        if not function.isidentifier():
            raise UserError(f"{who}: program '{program}': expected path/to/file.py:function, found no function name")
        return Path(path)
    from pipeline.tiny import TEACHERS

    known = [*(TINY + name for name in TEACHERS), WORKED]
    if program in known:
        return None
    near = difflib.get_close_matches(program, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"{who}: unknown program '{program}'.{hint} Expected one of {', '.join(known)}, or path/to/file.py:function"
    )


def _solution(ask: Ask) -> str | None:
    solution = ask.metadata.get("solution")
    return solution if isinstance(solution, str) and solution.strip() else None


def _user_call(program: str, path: Path, who: str) -> Call:
    module = _module(path, who)
    name = program.rpartition(":")[2]
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UserError(
            f"{who}: {path}: expected a function '{name}', found {', '.join(there) or 'no function'}. "
            f"Define it as `def {name}(prompt, rng): ...`, or name another"
        )
    takes = _keywords(function, f"{who}: {program}")

    def call(ask: Ask, sample: int, rng: random.Random) -> Any:
        row = {
            "answer": ask.answer, "messages": ask.messages, "metadata": ask.metadata,
            "prompt_id": ask.prompt_id, "sample": sample,
        }  # fmt: skip
        return function(ask.messages[-1]["content"], rng, **{k: row[k] for k in takes})

    return call


def _keywords(function: Callable[..., Any], what: str) -> tuple[str, ...]:
    """Which columns of the row a function asks for; UserError if (prompt, rng) cannot be handed to it."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = ROW if every else tuple(k for k in ROW if k in named)
    try:
        signature.bind("", None, **dict.fromkeys(takes))
    except TypeError as e:
        raise UserError(
            f"{what}: expected a function (prompt, rng) that may also take {', '.join(ROW)}; found "
            f"{signature} ({e}). Change its parameters"
        ) from None
    return takes


def _module(path: Path, who: str) -> ModuleType:
    name = "dypo_program_" + hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # a .py file always has a spec and a loader
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise UserError(f"{who}: {path}: cannot be imported: {type(e).__name__}: {e}. Correct the file") from None
    return module
