"""Which of the asked prompts a recorded row belongs to.

The prompt with the same messages (`prompt_id`, or the row's problem); else, system messages aside, the one with the same
conversation; else the one whose last user message is the row's problem; else the one whose last user message stands whole in
the row's prompt, which is how loggers of rollouts keep it: rendered by a chat template (TRL, verl). One template renders all
rows of a file alike, so what stood around one prompt is tried on the next one before every prompt is searched for again.
"""

import re
from collections.abc import Sequence

from pipeline.engines.base import Ask
from pipeline.sources import FIX, PROMPT_COLUMNS, Row, prompt_messages
from schemas.errors import UserError
from schemas.ids import digest, prompt_id

COLUMNS = (*PROMPT_COLUMNS, "input")  # the last is verl's, in its dumps of rollouts
SEARCHES = 200  # rows whose prompt is looked for among all prompts


class Match:
    """Finds the prompts that a record belongs to."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._ids = {ask.prompt_id for ask in asks}
        self._talks: dict[str, list[str]] = {}
        self._around: dict[tuple[str, str], None] = {}  # what a template put before and after a prompt
        self._searched = 0
        last: dict[str, dict[str, list[str]]] = {}
        for ask in asks:
            talk = _talk(ask.messages)
            self._talks.setdefault(talk, []).append(ask.prompt_id)
            last.setdefault(ask.messages[-1]["content"].strip(), {}).setdefault(talk, []).append(ask.prompt_id)
        # a last message that ends two different conversations tells neither of them
        self._last = {text: next(iter(talks.values())) for text, talks in last.items() if len(talks) == 1}

    def __call__(self, row: Row) -> tuple[list[str], str]:
        """(ids of the prompts, the record's problem)."""
        if isinstance(key := row.values.get("prompt_id"), str):
            return ([key] if key in self._ids else []), key
        column = next((c for c in COLUMNS if row.values.get(c) is not None), None)
        if column is None:
            raise UserError(
                f"{row.where}: no prompt. Expected one of {', '.join(COLUMNS)} or prompt_id, found "
                f"{', '.join(row.values) or 'no column'}. {FIX}"
            )
        messages = prompt_messages(row, column)
        text = messages[-1]["content"]
        if (key := prompt_id(messages)) in self._ids:
            return [key], text
        if ids := self._talks.get(_talk(messages)):
            return ids, text
        if any(m["role"] != "system" for m in messages[:-1]):
            return [], text
        return self._last.get(text.strip()) or self._rendered(text), text

    def _rendered(self, text: str) -> list[str]:
        """The longest last message of a prompt that stands in `text` between white space, tags or its ends."""
        for before, after in self._around:
            if text.startswith(before) and text.endswith(after):
                inside = text[len(before) : len(text) - len(after)].strip()
                if inside in self._last:
                    return self._last[inside]
        if self._searched >= SEARCHES:
            return []
        self._searched += 1
        for known in sorted((k for k in self._last if k and k in text), key=len, reverse=True):
            if found := re.search(rf"(?<![^\s>\]]){re.escape(known)}(?![^\s<\[])", text):
                self._around[text[: found.start()], text[found.end() :]] = None
                return self._last[known]
        return []


def _talk(messages: list[dict[str, str]]) -> str:
    return digest([[m["role"], m["content"].strip()] for m in messages if m["role"] != "system"])
