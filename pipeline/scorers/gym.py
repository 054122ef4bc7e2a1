"""reasoning-gym: the task's own score_answer, on the entry that the prompt's metadata carries.

metadata is {"task": name, "entry": {question, answer, metadata}}, and may hold "config", the task's
settings where they are not the defaults (four tasks look at them when scoring). Correct only at
exactly 1.0; the score is the reward. The task decides, so the prompt's `answer` is not looked at:
some tasks accept many answers and store none.
"""

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pipeline.scorers.base import Verdict, error, gold_bad, judged, last_boxed, unparseable

VERSION = 1
TAIL_CHARS = 100_000
_TUPLE_TASKS = {"arc_agi", "rearc"}  # these compare grids of tuples, which JSON turns into lists

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STATED = re.compile(r"(?i:answer\s+is\b\s*:?|answer\s*\*{0,2}\s*:)[ \t*]*")


def bad_gold(metadata: dict[str, Any] | None) -> str | None:
    if not isinstance(metadata, dict) or "task" not in metadata or "entry" not in metadata:
        return 'a reasoning_gym prompt wants metadata {"task": ..., "entry": {...}}'
    if not isinstance(metadata["entry"], dict) or "answer" not in metadata["entry"]:
        return "metadata.entry wants the task's entry: question, answer, metadata"
    try:
        _score_function(str(metadata["task"]), _config(metadata))
    except Exception as reason:
        return f"reasoning_gym has no scorer for {str(metadata['task'])!r}: {reason}"
    return None


def score(text: str, metadata: dict[str, Any] | None) -> Verdict:
    if reason := bad_gold(metadata):
        return gold_bad(reason)
    assert metadata is not None
    extracted = extract(text[-TAIL_CHARS:])
    if not extracted:
        return unparseable("the text has no answer")
    entry = metadata["entry"]
    if metadata["task"] in _TUPLE_TASKS:
        entry = {**entry, "metadata": _tuples(entry["metadata"])}
    value = float(_score_function(str(metadata["task"]), _config(metadata))(extracted, entry))
    if not math.isfinite(value):
        return error(f"the task's score is {value}", extracted)
    return judged(value == 1.0, extracted, reward=value)


def extract(text: str) -> str:
    """<answer>...</answer>, else \\boxed{}, else what follows the last "answer is" or "Answer:", else the last line."""
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    if box := last_boxed(text):
        return box[2].strip()
    stated = list(_STATED.finditer(text))
    if stated and (rest := text[stated[-1].end() :].strip()):
        return rest
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _config(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata.get("config") or {}, sort_keys=True)


@lru_cache(maxsize=256)
def _score_function(task: str, config: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym  # two seconds; only where a recipe uses it

    return reasoning_gym.create_dataset(task, **json.loads(config)).score_answer


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    return value
