"""Content ids. A row's id is a hash of what made it, so a repeated write is a no-op and a split cannot leak."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form: sorted keys, no spaces, full float precision."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """The id of a prompt: of its messages alone, so equal prompts cannot stand on both sides of a split."""
    return digest([[m["role"], m["content"]] for m in messages])[:32]


def row_id(*parts: Any) -> str:
    """The id of a trace or rollout from everything that made it."""
    return digest(list(parts))[:32]


def rows_digest(keys: Iterable[Sequence[Any]]) -> str:
    """What a partition holds, whatever its division into parts: a hash of its sorted keys and contents."""
    return digest(sorted(list(k) for k in keys))


def text_sha(text: str) -> str:
    """What a verdict says that it judged."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_from(*parts: Any) -> int:
    """A 63-bit seed that is a pure function of its parts."""
    return int(digest(list(parts))[:16], 16) >> 1
