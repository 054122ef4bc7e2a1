"""Engine `replay`: traces that were recorded elsewhere, as one of the teachers.

A record is recognised by its columns, in this order:

    target       LUFFY: [{role, content}], one teacher. The official DYPO code's: [{role, content: [text, ...]}], a
                 text for each teacher, `select` = its index. Ours: [{role, content, teacher}], `select` = the name
    generations  OpenR1-Math-220k: a list of texts, samples of one teacher, in order; `finish_reasons` beside it, or
                 `is_reasoning_complete`, says which ones were cut off (length)
    text, completion (TRL), response or output (verl)     one sample a row; `teacher`, `sample`, `finish_reason`,
                 `model` beside it count
    messages     that end with the assistant's: its answer

matching.py says which prompt a record belongs to. Numbers and truth values beside a text (for generations: in lists as long
as theirs) were recorded of that trace, verdicts among them, and are kept in its `sampling` as `recorded`. Samples that
the file does not have are absent, not failed.

A text where one per teacher is expected is refused: picking "the second" of a text would take its second letter.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.engines.base import Ask, Failure, Finished, Sample
from pipeline.engines.matching import COLUMNS, Match
from pipeline.sources import (
    FIX,
    PARQUET,
    PROMPT_COLUMNS,
    Row,
    data_files,
    kind_of,
    parquet_schema,
    plain,
    read_rows,
    short,
    whole_unicode,
)
from schemas.errors import UserError
from schemas.recipe import ReplayEngine

FLUSH_ROWS = 256
TEXT_COLUMNS = ("text", "completion", "response", "output")
BESIDE = (
    "teacher",
    "sample",
    "finish_reason",
    "finish_reasons",
    "is_reasoning_complete",
    "model",
    "sampling",
)
FORMS = """\
  - target: a list of {role, content} (LUFFY), with `teacher` beside content, or with a list of texts as content
  - generations: a list of texts (OpenR1-Math-220k)
  - text, completion, response or output: one trace a row (TRL's logged completions, verl's dumped rollouts)
  - messages that end with the assistant's
each beside prompt, problem, question, messages, input or prompt_id"""
NO_VALUES = frozenset({*COLUMNS, "prompt_id", "sample"})
THINK = "<think>"


@dataclass(frozen=True)
class Trace:
    """One recorded text; `sample` None: the next of its prompt."""

    text: str
    where: str
    finish_reason: str = "stop"
    sample: int | None = None
    teacher: str | None = None
    model: str = ""
    sampling: str = "{}"
    recorded: Mapping[str, bool | int | float] = field(default_factory=dict)


Recorded = dict[str, dict[int, Trace]]  # prompt_id -> sample -> trace


class ReplayTeacher:
    """Recorded traces for the prompts asked for; `note` says how many records and prompts met."""

    name = "replay"
    seeded = False
    complete = False

    def __init__(self, config: ReplayEngine, who: str = "replay") -> None:
        self._path, self._select, self._who = config.path, config.select, who
        self._files = {path: self._skipped(path) for path in data_files(config.path)}
        self.note = ""

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """Yields lists in the order of asks. The whole file is read and checked before the first one."""
        if not any((ask.prompt_id, s) not in finished for ask in asks for s in ask.samples):
            return
        recorded = self._read(asks)
        batch: list[Sample | Failure] = []
        for ask in asks:
            found = recorded[ask.prompt_id]
            for sample in ask.samples:
                if sample in found and (ask.prompt_id, sample) not in finished:
                    t = found[sample]
                    batch.append(Sample(ask.prompt_id, sample, t.text, t.finish_reason, t.model, t.sampling))
                if len(batch) >= FLUSH_ROWS:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _read(self, asks: Sequence[Ask]) -> Recorded:
        recorded: Recorded = {ask.prompt_id: {} for ask in asks}
        match = Match(asks)
        records = matched = 0
        example = ""
        teachers: set[str | None] = set()
        others: set[str | None] = set()
        for path, skip in self._files.items():
            for row in read_rows(path, skip):
                records += 1
                traces = _traces(row, self._select)
                ids, asked = match(row)
                example = example or asked
                if not ids:
                    continue
                matched += 1
                for trace in traces:
                    if self._select is not None and trace.teacher not in (None, self._select):
                        others.add(trace.teacher)
                        continue
                    teachers.add(trace.teacher)
                    for key in ids if len(teachers) == 1 else ():
                        self._add(recorded[key], trace)
        if len(teachers) > 1:
            raise UserError(
                f"{self._who}: {self._path}: expected traces of one teacher, found those of {_names(teachers)}. "
                "Set `select` to one of the names; each is a teacher of its own in the recipe"
            )
        covered = sum(bool(traces) for traces in recorded.values())
        if not matched:
            raise UserError(
                f"{self._who}: {self._path}: none of its {records} records matches one of the {len(asks)} prompts.\n"
                f"  a record: {short(example, 200)!r}\n  a prompt: {short(asks[0].messages[-1]['content'], 200)!r}\n"
                "Expected the same text in both (a suffix, or another spelling, makes another prompt). Ingest the "
                "problems from this file, or correct `path`"
            )
        if not covered:
            chosen = f" for select = '{self._select}'" if self._select is not None else ""
            chosen += f" (it has those of {_names(others)})" if others else ""
            raise UserError(
                f"{self._who}: {self._path}: {matched} of {records} records match a prompt, and none has a trace"
                f"{chosen}. Expected at least one text; correct `path` or `select`"
            )
        rest = f"; {records - matched} records match no prompt" if matched < records else ""
        self.note = (
            f"{self._path.name}: {matched} of {records} records matched, {covered} of {len(asks)} prompts have a trace{rest}"
        )
        return recorded

    def _skipped(self, path: Path) -> frozenset[str]:
        """Columns that need not be read; UserError if the file is not one of traces."""
        if path.suffix not in PARQUET:
            return frozenset()
        schema = parquet_schema(path)
        names = schema.names
        form = _form(names)
        if form is None:
            raise _not_recognised(path, names)
        used = {*COLUMNS, "prompt_id", form, *BESIDE, *(f.name for f in schema if _holds_values(f.type, form))}
        if form != "messages" and any(c in names for c in PROMPT_COLUMNS if c != "messages"):
            used.discard("messages")
        return frozenset(names) - used

    def _add(self, into: dict[int, Trace], trace: Trace) -> None:
        sample = trace.sample
        if sample is None:
            sample = max(into, default=-1) + 1
        elif sample in into:
            raise UserError(
                f"{self._who}: {trace.where}: sample {sample} of its prompt stands in {into[sample].where} already. "
                "Expected each sample once: number them from 0, or leave `sample` out"
            )
        into[sample] = trace


def _names(teachers: set[str | None]) -> str:
    return ", ".join(sorted(f"'{t}'" if t is not None else "(no name)" for t in teachers))


# ---------------------------------------------------------------- records
def _form(columns: Sequence[str]) -> str | None:
    return next((c for c in ("target", "generations", *TEXT_COLUMNS, "messages") if c in columns), None)


def _not_recognised(where: Path | str, columns: Sequence[str]) -> UserError:
    return UserError(
        f"{where}: no recorded trace recognised. Found: {', '.join(columns) or 'no column'}. Expected one of:\n{FORMS}\n"
        "Rename the columns, or write the file again in one of these forms"
    )


def _traces(row: Row, select: str | None) -> list[Trace]:
    """A record's traces; empty texts are absent."""
    form = _form(list(row.values))
    if form is None:
        raise _not_recognised(row.where, list(row.values))
    value = row.values[form]
    if value is None:
        return []
    if form == "target":
        made = _target(row, value, select)
    elif form == "generations":
        made = _generations(row, value, select)
    elif form == "messages":
        made = _last_answer(row, value, select)
    else:
        made = _one_text(row, form, value, select)
    model = row.values.get("model")
    model = model if isinstance(model, str) else row.path.name
    sampling = _sampling(row)
    alone = None if form == "generations" else _values(row.values)
    out = []
    for t in made:
        if t.text.strip():
            recorded = t.recorded if alone is None else alone
            told = {**sampling, "recorded": recorded} if recorded else sampling
            out.append(replace(t, model=model, sampling=json.dumps(told)))
    return out


def _sampling(row: Row) -> dict[str, Any]:
    """How the row says that it was sampled: an object, or a text that is one in JSON."""
    value = row.values.get("sampling")
    try:
        read = json.loads(value) if isinstance(value, str) else value or {}
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UserError(
            f"{row.where}: `sampling`: expected an object in JSON, found {kind_of(value)} ({short(value, 40)}). {FIX}"
        )
    return plain(read)


def _values(values: Mapping[str, Any]) -> dict[str, bool | int | float]:
    """The numbers and truth values of a row, but those that say which prompt or sample it is."""
    numbers = {k: v for k, v in values.items() if k not in NO_VALUES and isinstance(v, bool | int | float)}
    return {k: v for k, v in numbers.items() if math.isfinite(v)}


def _holds_values(kind: pa.DataType, form: str) -> bool:
    if form == "generations" and pa.types.is_list(kind):
        kind = kind.value_type
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _target(row: Row, value: Any, select: str | None) -> list[Trace]:
    where = f"{row.where}: `target`"
    if isinstance(value, str):
        if select is not None:
            raise _one_per_teacher(where, value, select)
        return [Trace(_clean(value), row.where)]
    if not isinstance(value, list) or not all(isinstance(m, dict) and "content" in m for m in value):
        raise UserError(f"{where}: expected a list of {{role, content}}, found {kind_of(value)}. {FIX}")
    answers = [m for m in value if m.get("role", "assistant") == "assistant" and m["content"] is not None]
    named = [m for m in answers if m.get("teacher") is not None]
    if named and len(named) < len(answers):
        raise UserError(f"{where}: expected a `teacher` in all messages or in none, found it in some. {FIX}")
    if named:
        return [Trace(_text(f"{where}, content", m["content"]), row.where, teacher=str(m["teacher"])) for m in named]
    return [t for m in answers for t in _unnamed(row.where, f"{where}, content", m["content"], select)]


def _unnamed(row: str, where: str, content: Any, select: str | None) -> list[Trace]:
    """The trace in one message of a target that names no teacher: a text, or a list with one for each teacher."""
    if isinstance(content, str):
        if select is not None:
            raise _one_per_teacher(where, content, select)
        return [Trace(_clean(content), row)]
    if not isinstance(content, list):
        raise UserError(f"{where}: expected text, or a list of one text per teacher, found {kind_of(content)}. {FIX}")
    if select is None:
        if len(content) == 1:
            return [Trace(_text(where, content[0]), row)]
        raise UserError(
            f"{where}: found a list of {len(content)} texts, one per teacher, and expected to be told which. Set "
            f"`select` to an index from '0' to '{len(content) - 1}'; each is a teacher of its own in the recipe"
        )
    if not select.isdecimal() or int(select) >= len(content):
        raise UserError(
            f"{where}: expected `select` to be an index from '0' to '{len(content) - 1}' (the list has {len(content)} "
            f"texts, one per teacher), found '{select}'. Correct `select`"
        )
    chosen = content[int(select)]
    return [] if chosen is None else [Trace(_text(where, chosen), row)]


def _one_per_teacher(where: str, text: str, select: str) -> UserError:
    return UserError(
        f"{where}: select = '{select}' expects a list of texts, one per teacher (or messages with `teacher`), found a "
        f"single text ({short(text, 40)!r}). This file has one teacher: leave `select` out"
    )


def _generations(row: Row, value: Any, select: str | None) -> list[Trace]:
    where = f"{row.where}: `generations`"
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of texts, found {kind_of(value)}. {FIX}")
    if select is not None:
        raise UserError(
            f"{where}: select = '{select}' expects several teachers; generations are samples of one. Leave `select` out"
        )
    reasons, complete = row.values.get("finish_reasons"), row.values.get("is_reasoning_complete")
    out = []
    for i, text in enumerate(value):
        if text is None:
            continue
        reason = _at(reasons, i)
        if reason is None and _at(complete, i) is False:
            reason = "length"
        lists = {k: _at(v, i) for k, v in row.values.items() if isinstance(v, list) and len(v) == len(value)}
        out.append(Trace(_text(where, text), row.where, _finish(reason), recorded=_values(lists)))
    return out


def _at(values: Any, i: int) -> Any:
    return values[i] if isinstance(values, list) and i < len(values) else None


def _finish(reason: Any) -> str:
    return "length" if reason == "length" else "stop"


def _last_answer(row: Row, value: Any, select: str | None) -> list[Trace]:
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        found = f"role '{last.get('role')}'" if isinstance(last, dict) else kind_of(value)
        raise UserError(
            f"{row.where}: `messages`: expected the last message to be the assistant's, the trace; found {found}. {FIX}"
        )
    return [Trace(_text(f"{row.where}: `messages`", last.get("content")), row.where, **_beside(row, select))]


def _one_text(row: Row, column: str, value: Any, select: str | None) -> list[Trace]:
    where = f"{row.where}: `{column}`"
    if isinstance(value, list) and value and isinstance(value[-1], dict):  # TRL's conversational completion
        value = value[-1].get("content")
    return [Trace(_text(where, value), row.where, **_beside(row, select))]


def _beside(row: Row, select: str | None) -> dict[str, Any]:
    sample, teacher = row.values.get("sample"), row.values.get("teacher")
    if select is not None and teacher is None:
        raise UserError(
            f"{row.where}: select = '{select}' expects a `teacher` beside the text, found none. Leave `select` out, or "
            "name the teacher in each row"
        )
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 0):
        raise UserError(
            f"{row.where}: `sample`: expected a number from 0, found {kind_of(sample)} ({short(sample, 20)}). {FIX}"
        )
    return {
        "sample": sample,
        "teacher": None if teacher is None else str(teacher),
        "finish_reason": _finish(row.values.get("finish_reason")),
    }


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, found {kind_of(value)} ({short(value, 40)}). {FIX}")
    return _clean(value)


def _clean(text: str) -> str:
    """A text that can be stored, with a doubled `<think>` at its start made one (ALGORITHMS 7.3, row 15)."""
    text = whole_unicode(text)
    while text.startswith(THINK) and (rest := text[len(THINK) :].lstrip()).startswith(THINK):
        text = rest
    return text
