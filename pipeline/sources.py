"""Sources -> prompts: JSONL, Parquet, CSV and reasoning-gym tasks, checked row by row before anything is written.

One idea: a row is a plain dict that knows its place, so whatever is wrong with it is said with file and row.
JSON lines are parsed one by one (an error has its line number) and Parquet goes through pyarrow, batch by
batch, without the trace columns: of a file with gigabytes of recorded traces, the problems alone are read.

A row's problem is the first of `prompt`, `problem`, `question`, `messages` that the file has. Its gold answer
is verl's `reward_model.ground_truth`, else `answer`, else `solution`, kept exactly (GSM8K's keeps `#### 42`).
A multiple-choice row (ARC's or GPQA's columns) has options instead: they are shown below the question in an order
that a seed and the question decide, and the gold answer is the letter of the right one.
Assistant messages that end `messages` are cut off: they are an answer, and `dypo generate teachers` can
import them (engine `replay`). All other columns but the traces become `metadata`; `solution` stays there even where
it is the gold answer, since the teacher `worked_solution` reads it.

It leaves out whether a gold answer parses (scorers) and how a prompt is rendered (policy).
"""

import csv
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.ids import digest, prompt_id
from schemas.recipe import FileSource, GymSource
from schemas.tables import ARROW
from schemas.templates import asked

JSONL, PARQUET, CSV = (".jsonl", ".ndjson"), (".parquet",), (".csv",)
KINDS = JSONL + PARQUET + CSV
PROMPT_COLUMNS = ("prompt", "problem", "question", "messages", "Problem", "Question")
ANSWER_COLUMNS = ("answer", "solution", "Answer")
ARC = ("choices", "answerKey")  # {text: [...], label: [...]}, and the label of the right one
GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
GONE = {"answer": ("answer",), "Answer": ("Answer",), ARC[1]: ARC, GPQA[0]: GPQA}  # of the gold answer, not kept as metadata
TRACE_COLUMNS = frozenset({"target", "target_lst", "target_ds_qwen_7b_probs", "generations", "completion", "completions"})
FORMS = """\
  - prompt, problem or question (text, or a list of {role, content}) with answer or solution
  - messages (a list of {role, content}) with answer or solution
  - question with choices ({text, label}, two lists) and answerKey (ARC)
  - Question with Correct Answer and Incorrect Answer 1, 2 and 3 (GPQA)
  - verl: prompt (a list of {role, content}) with reward_model.ground_truth"""
FIX = "Correct the row, or delete it"
MERGED = b"dypo.merged"  # schema metadata of read_source's table: repeated gym questions that were merged

Messages = list[dict[str, str]]


# ---------------------------------------------------------------- files
@dataclass(frozen=True)
class Row:
    """One row of a file; `number` counts from 1 and is the line of a JSONL file."""

    path: Path
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, row {self.number}"


def data_files(path: Path) -> list[Path]:
    """The JSONL, Parquet and CSV files that `path` means: itself, or all in a folder; UserError if none."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        found = [p for p in inside if not any(part[0] in "._" for part in p.relative_to(path).parts)]
        found = [p for p in found if p.suffix in KINDS]
        if not found:
            raise UserError(
                f"{path}: no .jsonl, .parquet or .csv file in this folder. Give a file, or a folder that has some"
            )
        return found
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in KINDS)
        hint = f" Data files beside it: {', '.join(near[:5])}." if near else ""
        raise UserError(f"{path}: no such file.{hint} Correct `path`, which is taken from the working directory")
    if path.suffix not in KINDS:
        raise UserError(
            f"{path}: expected a .jsonl, .ndjson, .parquet or .csv file, found {path.suffix or 'no extension'!r}. "
            f"Convert it, for example: duckdb -c \"copy (from '{path.name}') to '{path.stem}.parquet'\""
        )
    return [path]


def files_digest(path: Path) -> str:
    """sha256 of a file's content, or a digest over a folder's data files (names and contents)."""
    files = data_files(path)
    if files == [path]:
        return _sha256(path)
    return digest([[p.relative_to(path).as_posix(), _sha256(p)] for p in files])


def read_rows(path: Path, skip: frozenset[str] = frozenset(), limit: int | None = None) -> Iterator[Row]:
    """The rows of one file without the columns in `skip`. UserError for whatever cannot be read."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty. Expected at least one row; write it again or correct `path`")
    read = _json_lines if path.suffix in JSONL else _csv if path.suffix in CSV else _parquet
    count = 0
    for row in read(path, skip):
        yield row
        count += 1
        if count == limit:
            return
    if count == 0:
        raise UserError(f"{path}: no row in the file. Expected at least one; write it again or correct `path`")


def parquet_schema(path: Path) -> pa.Schema:
    """A Parquet file's Arrow schema; UserError if it is none."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from None


def _json_lines(path: Path, skip: frozenset[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as e:
                raise UserError(f"{path}, line {number}: expected UTF-8, found {e}. Save the file as UTF-8") from None
            if not text:
                continue
            try:
                values = json.loads(text)
            except json.JSONDecodeError as e:
                array = " The file looks like one JSON array over several lines." if text == "[" else ""
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({e.msg} at column {e.colno}); "
                    f"found {short(text)!r}."
                    f"{array} Expected one JSON object on each line: correct or delete this line"
                ) from None
            if not isinstance(values, dict):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object, found {kind_of(values)}. Write one object a line"
                )
            yield Row(path, number, {k: v for k, v in values.items() if k not in skip})


def _csv(path: Path, skip: frozenset[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, values in enumerate(reader, 1):
                if None in values or None in values.values():
                    raise UserError(
                        f"{path}, row {number} (it ends in line {reader.line_num}): expected {len(reader.fieldnames or ())} fields, as in "
                        f"the first line, found {'more' if None in values else 'fewer'}. {FIX}"
                    )
                yield Row(path, number, {k: v or None for k, v in values.items() if k not in skip})
        except (csv.Error, UnicodeDecodeError) as e:
            raise UserError(
                f"{path}, line {reader.line_num}: not readable as CSV ({e}). Save the file as CSV in UTF-8"
            ) from None


def _parquet(path: Path, skip: frozenset[str]) -> Iterator[Row]:
    names = [n for n in parquet_schema(path).names if n not in skip]
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=names):
                for values in _without_nanoseconds(batch).to_pylist():
                    number += 1
                    yield Row(path, number, values)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from None


def _without_nanoseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Nanosecond times as text: Python has no type for them."""
    arrays = [
        a.cast(pa.string()) if pa.types.is_temporal(a.type) and getattr(a.type, "unit", "") == "ns" else a
        for a in batch.columns
    ]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _unreadable(path: Path, why: Exception) -> UserError:
    first = (str(why).splitlines() or [type(why).__name__])[0]
    return UserError(f"{path}: not readable as Parquet ({first}). The file is damaged or of another kind: write it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- values of a row
def short(text: Any, width: int = 80) -> str:
    """The start of a text on one line, for messages."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 3] + "..."


def kind_of(value: Any) -> str:
    """What a value is, in the words of a data file."""
    if value is None:
        return "null"
    names = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def prompt_messages(row: Row, column: str) -> Messages:
    """The chat that a row's `column` asks with, the last message the user's."""
    value = row.values.get(column)
    if isinstance(value, str) and column != "messages":
        value = [{"role": "user", "content": value}]
    if value is None or value == []:
        raise UserError(f"{row.where}: no prompt. Expected text or messages in `{column}`, found {kind_of(value)}. {FIX}")
    if not isinstance(value, list):
        wanted = "messages" if column == "messages" else "text or messages"
        raise UserError(f"{row.where}: `{column}`: expected {wanted}, found {kind_of(value)} ({short(value, 40)}). {FIX}")
    messages = [_message(row, column, i, m) for i, m in enumerate(value, 1)]
    if column == "messages":
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    if not messages or messages[-1]["role"] != "user":
        last = f"one of role '{messages[-1]['role']}'" if messages else "none but the assistant's"
        raise UserError(f"{row.where}: `{column}`: expected the last message to be the user's, found {last}. {FIX}")
    if not messages[-1]["content"].strip():
        raise UserError(f"{row.where}: the prompt in `{column}` is empty; expected text. {FIX}")
    return messages


def _message(row: Row, column: str, i: int, value: Any) -> dict[str, str]:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not role or not isinstance(content, str):
        found = f"role {short(role)!r}, content {kind_of(content)}" if isinstance(value, dict) else kind_of(value)
        raise UserError(f"{row.where}: `{column}`, message {i}: expected {{role, content}}, both text; found {found}. {FIX}")
    _refuse_bad_unicode(row, column, content)
    return {"role": role, "content": content}


def _refuse_bad_unicode(row: Row, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{row.where}: `{column}`: expected valid Unicode, found half a character at position {e.start} "
            f"({text[e.start]!r}). {FIX}"
        ) from None


def _answer(row: Row, column: str) -> str:
    """The gold answer as text: numbers are written out (42.0 as 42), verl's lists and objects as JSON."""
    verl = column == "reward_model"
    value = row.values.get(column)
    if verl:
        value = value.get("ground_truth") if isinstance(value, dict) else None
        column = "reward_model.ground_truth"
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or (isinstance(value, str) and not value.strip()):
        found = "nothing" if value is None else "an empty text"
        raise UserError(
            f"{row.where}: no answer. Expected text or a number in `{column}`, found {found}. "
            "Give the row its gold answer, or delete it"
        )
    if isinstance(value, str):
        _refuse_bad_unicode(row, column, value)
        return value
    if isinstance(value, (list, dict)) and verl:
        return json.dumps(plain(value), ensure_ascii=False)
    if not isinstance(value, (bool, int, float, Decimal)):
        raise UserError(
            f"{row.where}: `{column}`: expected text or a number as the answer, found {kind_of(value)} "
            f"({short(value, 40)}). {FIX}"
        )
    return str(value)


def whole_unicode(text: str) -> str:
    """A text that can be written as UTF-8: JSON may hold halves of characters, which become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain(value: Any) -> Any:
    """A value that JSON can hold and any reader can parse: no NaN, half characters or bytes, keys as text."""
    if isinstance(value, Mapping):
        return {plain(k if isinstance(k, str) else str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return whole_unicode(str(value))


# ---------------------------------------------------------------- public: one source
def content_id(source: FileSource | GymSource) -> str:
    """What a source holds: sha256 of its file, or a digest of gym settings and reasoning_gym's version."""
    if isinstance(source, FileSource):
        if source.hub is not None and not source.path.exists():
            raise UserError(f"{source.path}: not there yet. `dypo ingest` fetches it from the hub's {source.hub}")
        return files_digest(source.path)
    tasks = [t.model_dump(mode="json") for t in source.tasks]
    return digest(["reasoning_gym", _gym_version(), tasks, source.seed, source.system, source.suffix])


def read_source(source: FileSource | GymSource) -> pa.Table:
    """A source's prompts, all checked, all with the source's split (`split_prompts` moves `eval_rows`)."""
    if isinstance(source, FileSource):
        return _table(source, _read_files(source))
    table = _table(source, entries := _read_gym(source))
    wanted = sum(t.size for t in source.tasks)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), MERGED: str(wanted - len(entries)).encode()})


def merged_rows(table: pa.Table) -> int:
    """How many repeated gym questions `read_source` merged into the first (in files they are refused)."""
    return int((table.schema.metadata or {}).get(MERGED, b"0"))


def _table(source: FileSource | GymSource, rows: Iterable[tuple[Messages, str, dict[str, Any]]]) -> pa.Table:
    made = [
        {
            "prompt_id": prompt_id(messages), "messages": messages, "answer": answer, "source": source.name,
            "verifier": source.verifier, "split": source.split,
            "metadata": json.dumps(plain(metadata), ensure_ascii=False),
        }
        for messages, answer, metadata in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=ARROW["prompts"])


def _asked(source: FileSource | GymSource, messages: Messages) -> Messages:
    """The messages as the source's template and system message put them."""
    system = source.system
    if source.template is not None:
        own, content = asked(source.template, messages[-1]["content"])
        system, messages = own or system, [*messages[:-1], {"role": "user", "content": content}]
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_options(row: Row, question: Messages, answer: str, seed: int) -> tuple[Messages, str, dict[str, Any]]:
    """A multiple-choice row's question with its options below, the letter of the right one, and the order for the metadata.

    The order is drawn from the seed and the question alone, so neither other rows nor their order matter.
    """
    texts, right = _gpqa_options(row) if answer == GPQA[0] else _arc_options(row)
    text = question[-1]["content"].strip()
    order = list(range(len(texts)))
    random.Random(f"{seed}/{text}").shuffle(order)
    letters = [chr(ord("A") + at) for at in range(len(order))]
    shown = "\n".join(f"{letter}) {texts[at]}" for letter, at in zip(letters, order, strict=True))
    messages = [*question[:-1], {"role": "user", "content": f"{text}\n\n{shown}"}]
    return messages, letters[order.index(right)], {"options": [texts[at] for at in order], "options_order": order}


def _gpqa_options(row: Row) -> tuple[list[str], int]:
    return [_option(row, column, row.values.get(column)) for column in GPQA], 0


def _arc_options(row: Row) -> tuple[list[str], int]:
    choices, key = (row.values.get(column) for column in ARC)
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list) or not 2 <= len(texts) == len(labels) <= 26:
        found = short(json.dumps(plain(choices)))
        raise UserError(
            f"{row.where}: `choices`: expected {{text, label}}, two lists of the same length, 2 to 26; found {found}. {FIX}"
        )
    if labels.count(key) != 1:
        raise UserError(
            f"{row.where}: `answerKey`: expected one of the labels {', '.join(map(str, labels))}, found {key!r}. {FIX}"
        )
    return [_option(row, "choices", text) for text in texts], labels.index(key)


def _option(row: Row, column: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{row.where}: `{column}`: expected an option's text, found {kind_of(text) if text else 'none'}. {FIX}"
        )
    _refuse_bad_unicode(row, column, text)
    return text.strip()


# ---------------------------------------------------------------- a file source
def _read_files(source: FileSource) -> list[tuple[Messages, str, dict[str, Any]]]:
    out: list[tuple[Messages, str, dict[str, Any]]] = []
    first: dict[str, tuple[Row, str]] = {}
    repeats: list[tuple[Row, str, Row, str, str]] = []
    files = data_files(source.path)
    for path in files:
        if source.limit is not None and len(first) + len(repeats) >= source.limit:
            break
        rest = None if source.limit is None else source.limit - len(first) - len(repeats)
        rows, prompt, answer = _recognised(path, rest)
        for row in rows:
            messages, order = prompt_messages(row, prompt), dict[str, Any]()
            if answer in (ARC[1], GPQA[0]):
                messages, gold, order = _with_options(row, messages, answer, source.options_seed)
            else:
                gold = _answer(row, answer)
            messages = _asked(source, messages)
            key = prompt_id(messages)
            if key in first:
                repeats.append((row, gold, *first[key], messages[-1]["content"]))
                continue
            first[key] = (row, gold)
            gone = {prompt, "messages", *GONE.get(answer, ())}
            kept = {k: v for k, v in row.values.items() if k not in gone and v is not None}
            out.append((messages, gold, {**kept, **order}))
    if repeats:
        raise _repeated(source.path, repeats)
    return out


def _recognised(path: Path, limit: int | None) -> tuple[list[Row], str, str]:
    """A file's rows, the column that holds the problem and the one that holds the answer."""
    skip = TRACE_COLUMNS
    if path.suffix in PARQUET:
        schema = parquet_schema(path)
        columns = list(schema.names)
        verl = "reward_model" in columns and _has_field(schema.field("reward_model").type, "ground_truth")
        prompt, answer = _form(path, columns, verl)
        rows = list(read_rows(path, skip | ({"messages"} - {prompt}), limit))
        return rows, prompt, answer
    rows = []
    seen: dict[str, None] = {}
    for row in read_rows(path, limit=limit):
        seen |= dict.fromkeys(row.values)
        row_has_other = any(row.values.get(c) is not None for c in PROMPT_COLUMNS if c != "messages")
        drop = skip | ({"messages"} if row_has_other else set())
        rows.append(Row(path, row.number, {k: v for k, v in row.values.items() if k not in drop}))
    models = (row.values.get("reward_model") for row in rows)
    prompt, answer = _form(path, list(seen), any(isinstance(m, dict) and "ground_truth" in m for m in models))
    return rows, prompt, answer


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and any(f.name == name for f in kind)


def _form(path: Path, columns: list[str], verl: bool) -> tuple[str, str]:
    prompt = next((c for c in PROMPT_COLUMNS if c in columns), None)
    options = next((answer for answer, all_of in ((ARC[1], ARC), (GPQA[0], GPQA)) if {*all_of} <= {*columns}), None)
    answer = "reward_model" if verl else options or next((c for c in ANSWER_COLUMNS if c in columns), None)
    if prompt and answer:
        return prompt, answer
    missing = " and ".join([*([] if prompt else ["no problem"]), *([] if answer else ["no answer"])])
    raise UserError(
        f"{path}: columns not recognised: {missing}. Found: {', '.join(columns) or 'none'}. "
        f"Expected one of:\n{FORMS}\nRename the columns, or write the file again in one of these forms"
    )


def _repeated(path: Path, repeats: list[tuple[Row, str, Row, str, str]]) -> UserError:
    row, gold, before, gold_before, text = repeats[0]
    more = f"; {len(repeats) - 1} more rows repeat prompts" if len(repeats) > 1 else ""
    answers = "" if gold == gold_before else f" Their answers differ ({short(gold_before, 30)!r}, {short(gold, 30)!r})."
    earlier = f"row {before.number}" if before.path == row.path else before.where
    fix = "Delete the repeated rows"
    column = next((c for c in PROMPT_COLUMNS if isinstance(row.values.get(c), str)), None)
    if path.is_file() and column:
        read, write = ("read_parquet", "write_parquet") if path.suffix in PARQUET else ("read_ndjson", "write_ndjson")
        new = path.with_name(f"{path.stem}.unique{path.suffix}")
        fix += (
            f" (this keeps the first of each: python -c \"import polars as pl; pl.{read}('{path}')"
            f".unique('{column}', keep='first', maintain_order=True).{write}('{new}')\")"
        )
    return UserError(
        f"{row.where}: the same prompt as {earlier} ({short(text, 60)!r}){more}. "
        f"Expected each prompt once in a source.{answers} {fix}"
    )


# ---------------------------------------------------------------- reasoning-gym
def _gym_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise UserError(NO_GYM) from None


NO_GYM = "a source of type 'reasoning_gym' needs the package of that name: pip install reasoning-gym"


def _read_gym(source: GymSource) -> list[tuple[Messages, str, dict[str, Any]]]:
    """The source's problems, generated in a child process with a fixed hash seed.

    Several tasks iterate over sets, so in this process they would give other problems on every start.
    """
    _gym_version()
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-P", "-c", "from pipeline.sources import gym_child; gym_child()"],
        input=source.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"source '{source.name}': reasoning_gym stopped with exit code {child.returncode}: {last}")
    reply = json.loads(child.stdout)
    if "refused" in reply:
        raise UserError(f"source '{source.name}': {reply['refused']}")
    out: list[tuple[Messages, str, dict[str, Any]]] = []
    seen: set[str] = set()
    for item in reply["entries"]:
        entry = item["entry"]
        messages = _asked(source, [{"role": "user", "content": entry["question"] + source.suffix}])
        if (key := prompt_id(messages)) not in seen:
            seen.add(key)
            out.append((messages, entry["answer"], item))
    return out


def gym_child() -> None:
    """The child's side of `_read_gym`: a source as JSON on stdin, its entries as JSON on stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # some tasks print
    source = GymSource.model_validate_json(sys.stdin.read())
    try:
        reply = {"entries": gym_entries(source)}
    except UserError as e:
        reply = {"refused": str(e)}
    json.dump(reply, out)
    out.flush()


def gym_entries(source: GymSource) -> list[dict[str, Any]]:
    """The problems of all tasks, as their prompts' metadata will be; in a process whose hash seed is fixed."""
    return [item for i, _ in enumerate(source.tasks) for item in _gym_task(source, i)]


def _gym_task(source: GymSource, i: int) -> Iterator[dict[str, Any]]:
    import dataclasses
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = source.tasks[i]
    if task.name not in DATASETS:
        near = difflib.get_close_matches(task.name, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"reasoning_gym has: {', '.join(sorted(DATASETS))}"
        raise UserError(f"tasks: reasoning_gym has no task '{task.name}'; {hint}")
    known = {f.name for f in dataclasses.fields(DATASETS[task.name][1])} - {"seed", "size"}
    for key in task.settings:
        if key not in known:
            raise UserError(
                f"task '{task.name}': unknown setting '{key}'. Known: {', '.join(sorted(known)) or 'none'} "
                "(seed is the source's, size the task's)"
            )
    random.seed(f"{source.seed}/{i}")  # list_functions draws from the global generator
    try:
        entries = list(reasoning_gym.create_dataset(task.name, size=task.size, seed=source.seed, **task.settings))
    except Exception as e:  # a task checks its settings with asserts, and may fail on odd ones anywhere
        raise UserError(
            f"task '{task.name}' refused settings {task.settings or '(none)'}: {type(e).__name__}: {e}. Correct the settings"
        ) from None
    for entry in entries:
        if entry["answer"] is None:
            raise UserError(
                f"task '{task.name}' gives problems without a gold answer, and a prompt needs one. Choose another task"
            )
        kept = {"question": entry["question"], "answer": str(entry["answer"]), "metadata": entry["metadata"]}
        item = {"task": task.name, "entry": plain(kept)}
        if task.settings:
            item["config"] = plain(task.settings)
        if (solution := worked_solution(task.name, entry)) is not None:
            item["solution"] = solution
        yield item


def worked_solution(task: str, entry: Mapping[str, Any]) -> str | None:
    """The worked solution that a reasoning-gym entry carries, if its task is one of the four that give any.

    gsm_symbolic tells it in words (`answer_cot`); the string machines list the states that they pass through
    (`states`), here one a line, the last being the answer. Other metadata restates the problem or the answer.
    """
    metadata = entry["metadata"]
    if task == "gsm_symbolic":
        return metadata.get("answer_cot")
    if task in ("string_manipulation", "string_splitting", "string_synthesis"):
        states = [s if isinstance(s, str) else " ".join(map(str, s)) for s in metadata.get("states", ())]
        if len(states) > 1 and states[-1] == entry["answer"]:
            return "\n".join(states)
    return None


# ---------------------------------------------------------------- public: all sources
def split_prompts(tables: Sequence[pa.Table], sources: Sequence[FileSource | GymSource]) -> pa.Table:
    """All sources as one table, each prompt once and on one side.

    `eval_rows` of a train source go to eval: those whose digest of prompt_id is smallest. Neither the order
    of rows nor a seed matters, and appending rows never moves an old train prompt to eval (it can move an
    eval prompt to train, as the number is fixed). UserError if a prompt stands in two sources, or one
    conversation on both sides of the split, whatever its system message.
    """
    split = [_eval_moved(table, source) for table, source in zip(tables, sources, strict=True)]
    places: dict[str, dict[str, Any]] = {}
    sides: dict[str, dict[str, Any]] = {}
    for table in split:
        for row in table.select(["prompt_id", "messages", "answer", "source", "split"]).to_pylist():
            if (other := places.setdefault(row["prompt_id"], row)) is not row:
                raise _twice(other, row)
            asked = digest([[m["role"], m["content"]] for m in row["messages"] if m["role"] != "system"])
            if (other := sides.setdefault(asked, row))["split"] != row["split"]:
                raise _leak(other, row, "They differ in the system message alone. ")
    return pa.concat_tables([t.replace_schema_metadata(ARROW["prompts"].metadata) for t in split])


def _eval_moved(table: pa.Table, source: FileSource | GymSource) -> pa.Table:
    if source.eval_rows == 0:
        return table
    if source.split == "eval":
        raise UserError(
            f"source '{source.name}': eval_rows = {source.eval_rows} belongs to a source with "
            "split = 'train'; here all prompts go to eval. Remove eval_rows (to use fewer rows, set limit)"
        )
    ids = table.column("prompt_id").to_pylist()
    if source.eval_rows >= len(ids):
        raise UserError(
            f"source '{source.name}': eval_rows = {source.eval_rows} of {len(ids)} prompts would leave "
            "nothing to train on. Lower eval_rows, or set split = 'eval'"
        )
    moved = set(sorted(ids, key=lambda i: digest(["eval", i]))[: source.eval_rows])
    sides = pa.array(["eval" if i in moved else "train" for i in ids], pa.string())
    at = table.schema.get_field_index("split")
    return table.set_column(at, table.schema.field(at), sides)


def _twice(a: dict[str, Any], b: dict[str, Any]) -> UserError:
    if a["split"] != b["split"]:
        return _leak(a, b, "")
    text = short(b["messages"][-1]["content"], 60)
    if a["answer"] != b["answer"]:
        found = f"with different answers ({short(a['answer'], 30)!r}, {short(b['answer'], 30)!r})"
        fix = "Find out which answer is right and delete the prompt from the other source"
    else:
        found = f"both with split '{a['split']}'"
        fix = "Delete it from one of them, or name only one of the two sources in the recipe"
    return UserError(
        f"sources '{a['source']}' and '{b['source']}': the prompt {text!r} stands in both, {found}. "
        f"Expected each prompt in one source. {fix}"
    )


def _leak(a: dict[str, Any], b: dict[str, Any], detail: str) -> UserError:
    text = short(b["messages"][-1]["content"], 60)
    where = f"{a['source']}' ({a['split']}) and '{b['source']}' ({b['split']})"
    return UserError(
        f"sources '{where}: the prompt {text!r} stands on both sides of the split, so evaluation would "
        f"measure what was trained on. {detail}Expected each prompt on one side. Delete it from one of them"
    )
