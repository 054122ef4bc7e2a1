"""What a chat server's reply means: the answers in it, or why there is none and whether to ask again.

Text that a server hands over apart as `reasoning_content` (or `reasoning`) is put before the answer in
<think>...</think>, which is what the same model writes behind a server that does not take it apart.
"""

import email.utils
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engines.spending import Usage
from pipeline.sources import whole_unicode

STOP, LENGTH = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}, {"length", "max_tokens"}

Answer = tuple[str, str]  # text, finish_reason


@dataclass(frozen=True)
class Reply:
    """A reply with at least one answer. `choices` counts the unusable ones too, `logprobs` the tokens that have theirs."""

    answers: list[Answer]
    choices: int
    logprobs: int
    model: str | None
    usage: Usage | None

    @property
    def undercounted(self) -> bool:
        """Whether `usage` leaves choices out, as llama.cpp's does for n > 1."""
        return self.usage is not None and self.usage.completion_tokens < self.logprobs


@dataclass(frozen=True)
class Bad:
    """An attempt that gave no sample: why, whether another may help, and how long the server asked to wait."""

    why: str
    again: bool = True
    wait_s: float | None = None
    connected: bool = True  # the server was there
    counts: bool = True  # towards the failures in a row that mean a broken server
    free: bool = False  # not an attempt: our own correction
    plainer: bool = False  # it may be that the server does not know a parameter: ask without
    fatal: str | None = None
    usage: Usage | None = None  # it was paid for all the same


def read(content: bytes) -> Reply | Bad:
    """The answers of a chat completion."""
    try:
        reply = json.loads(content)
    except ValueError:
        return Bad(f"garbage: expected JSON, found {content[:60]!r}")
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(reply, dict) or not isinstance(choices, list) or not choices:
        return Bad(f"garbage: expected choices with a message, found {content[:60]!r}")
    usage = _usage(reply.get("usage"))
    read = [_answer(choice, content) for choice in choices]
    answers = [a for a in read if not isinstance(a, Bad)]
    if not answers:
        return replace(next(a for a in read if isinstance(a, Bad)), usage=usage)
    model = reply.get("model")
    logprobs = sum(_logprobs(choice) for choice in choices)
    return Reply(answers, len(choices), logprobs, model if isinstance(model, str) and model else None, usage)


def _answer(choice: Any, content: bytes) -> Answer | Bad:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Bad(f"garbage: expected choices with a message, found {content[:60]!r}")
    text, reason = message.get("content"), choice.get("finish_reason")
    thought = message.get("reasoning_content") or message.get("reasoning")
    thought = thought.strip() if isinstance(thought, str) else ""
    finish = "stop" if reason in STOP else "length" if reason in LENGTH else None
    if isinstance(reason, str) and finish is None:
        return Bad(f"finish_reason '{reason}', expected stop or length", again=False, counts=False)
    if not isinstance(text, str) or not text.strip():
        if finish == "length" and thought:
            return Bad("max_tokens ended the reasoning before any answer; raise max_tokens", again=False)
        return Bad(f"garbage: expected a text, found {'an empty one' if isinstance(text, str) else repr(text)[:60]}")
    if finish is None:
        return Bad(f"garbage: expected a finish_reason, found {reason!r}")
    if thought and not text.lstrip().startswith("<think>"):
        text = f"<think>\n{thought}\n</think>\n\n{text.lstrip()}"
    return whole_unicode(text), finish


def _logprobs(choice: Any) -> int:
    """How many tokens of a choice have their log-probs beside them."""
    given = choice.get("logprobs") if isinstance(choice, dict) else None
    content = given.get("content") if isinstance(given, dict) else None
    return len(content) if isinstance(content, list) else 0


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt_tokens"), value.get("completion_tokens")
    return Usage(prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None


def said(e: Any) -> str:
    """The server's own words about an error, on one line."""
    body = e.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    words = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(words or e.message).split())[:300]


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
