"""Engine `replay`: every recorded form meets its prompts, and what cannot be told apart is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engines import matching, replay
from pipeline.engines.base import Ask, Sample
from pipeline.engines.replay import ReplayTeacher
from pipeline.engines.teachers import content_id, teacher_engine
from schemas.errors import UserError
from schemas.ids import prompt_id
from schemas.recipe import ReplayEngine, Teacher

SYSTEM = {"role": "system", "content": "Think."}
Got = list[tuple[str, int, str]]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(messages: str | list[dict[str, str]], samples: int = 1) -> Ask:
    chat = user(messages) if isinstance(messages, str) else messages
    return Ask(prompt_id(chat), chat, tuple(range(samples)), 0, "42", {})


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def engine(path: Path, select: str | None = None) -> ReplayTeacher:
    return ReplayTeacher(ReplayEngine(type="replay", path=path, select=select), "teacher 't'")


def samples(it: ReplayTeacher, asks: list[Ask], finished: frozenset = frozenset()) -> list[Sample]:
    out = [item for batch in it.run(asks, finished) for item in batch]
    assert all(isinstance(s, Sample) for s in out)
    return [s for s in out if isinstance(s, Sample)]


def texts(it: ReplayTeacher, *asks: Ask) -> Got:
    names = {a.prompt_id: a.messages[-1]["content"] for a in asks}
    return [(names[s.prompt_id], s.sample, s.text) for s in samples(it, list(asks))]


def refused(it: ReplayTeacher, *asks: Ask) -> str:
    with pytest.raises(UserError) as e:
        samples(it, list(asks) or [ask("p")])
    return str(e.value)


def target(content: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": user("p"), "target": [{"role": "assistant", "content": content, **more}]}


# ---------------------------------------------------------------- forms
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_luffy_target_is_one_trace_of_one_teacher(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / f"a.{write.__name__}", target("<think>\nhm"), {**target("other"), "prompt": user("q")})
    assert texts(engine(path), ask("p"), ask("q"), ask("r")) == [("p", 0, "<think>\nhm"), ("q", 0, "other")]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_dypo_target_has_a_text_for_each_teacher_and_select_is_the_index(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / f"a.{write.__name__}", target(["first", "second"]))
    assert texts(engine(path, "0"), ask("p")) == [("p", 0, "first")]
    assert texts(engine(path, "1"), ask("p")) == [("p", 0, "second")]
    said = refused(engine(path, "2"))
    assert f"{path}, row 1: `target`, content: expected `select` to be an index from '0' to '1'" in said
    assert "found '2'. Correct `select`" in said
    said = refused(engine(path))
    assert "found a list of 2 texts, one per teacher" in said
    assert "Set `select` to an index from '0' to '1'" in said


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_our_target_names_its_teachers_and_select_is_the_name(tmp_path: Path, write: Any) -> None:
    row = {
        "prompt": user("p"),
        "target": [{"role": "assistant", "content": f"by {t}", "teacher": t} for t in ("r1", "qwen")],
    }
    path = write(tmp_path / f"a.{write.__name__}", row)
    assert texts(engine(path, "qwen"), ask("p")) == [("p", 0, "by qwen")]
    said = refused(engine(path))
    assert f"{path}: expected traces of one teacher, found those of 'qwen', 'r1'. Set `select`" in said
    assert "none has a trace for select = 'gpt' (it has those of 'qwen', 'r1')" in refused(engine(path, "gpt"))


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_text_where_a_list_of_teachers_is_expected_is_refused_not_indexed(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / f"a.{write.__name__}", target("<think>\nhm"))
    said = refused(engine(path, "1"))
    assert f"{path}, row 1: `target`, content: select = '1' expects a list of texts, one per teacher" in said
    assert "found a single text ('<think> hm')" in said
    assert "leave `select` out" in said
    plain = write(tmp_path / f"b.{write.__name__}", {"prompt": "p", "target": "text"})
    assert "row 1: `target`: select = '0' expects a list of texts" in refused(engine(plain, "0"))
    assert texts(engine(plain), ask("p")) == [("p", 0, "text")]


def test_openr1_generations_are_samples_and_cut_off_ones_say_so(tmp_path: Path) -> None:
    beside = {"messages": [*user("p"), {"role": "assistant", "content": "a"}], "solution": "s", "answer": "4"}
    path = parquet(
        tmp_path / "a.parquet",
        {"problem": "p", "generations": ["a", "b"], "finish_reasons": ["stop", "length"],
         "is_reasoning_complete": [True, False], **beside},
        {"problem": "q", "generations": ["c", None, "d"], "finish_reasons": None,
         "is_reasoning_complete": [True, True, False], **beside},
    )  # fmt: skip
    it = engine(path)
    rows = samples(it, [ask("p", 4), ask("q", 4), ask("r", 4)])
    assert [(r.text, r.sample, r.finish_reason) for r in rows] == [
        ("a", 0, "stop"), ("b", 1, "length"), ("c", 0, "stop"), ("d", 1, "length"),
    ]  # fmt: skip
    assert it.note == "a.parquet: 2 of 2 records matched, 2 of 3 prompts have a trace"
    assert not it.complete
    assert [r.text for r in samples(it, [ask("p", 1)])] == ["a"]
    assert "select = '0' expects several teachers; generations are samples of one" in refused(engine(path, "0"))


def test_generations_that_are_one_text_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"problem": "p", "generations": "text"})
    assert f"{path}, row 1: `generations`: expected a list of texts, found text" in refused(engine(path))


@pytest.mark.parametrize("column", ["text", "completion", "response"])
def test_rows_of_prompt_and_text_are_samples_in_their_order(tmp_path: Path, column: str) -> None:
    rows = [{"prompt": p, column: t} for p, t in (("p", "1"), ("q", "2"), ("p", "3"), ("p", " "))]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert texts(engine(path), ask("p", 3), ask("q", 3)) == [("p", 0, "1"), ("p", 1, "3"), ("q", 0, "2")]


def test_teacher_sample_finish_reason_and_model_beside_a_text_count(tmp_path: Path) -> None:
    row = {"messages": user("p"), "finish_reason": "length", "model": "m", "sampling": '{"temperature": 1}'}
    rows = [{**row, "teacher": t, "sample": s, "text": f"{t}{s}"} for t in ("a", "b") for s in (1, 0)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    got = samples(engine(path, "b"), [ask("p", 2)])
    assert [(s.sample, s.text) for s in got] == [(0, "b0"), (1, "b1")]
    assert (got[0].finish_reason, got[0].model, got[0].sampling) == ("length", "m", '{"temperature": 1}')
    assert "found those of 'a', 'b'" in refused(engine(path))
    twice = jsonl(tmp_path / "b.jsonl", *({"prompt": "p", "sample": 0, "text": t} for t in "xy"))
    assert f"{twice}, row 2: sample 0 of its prompt stands in {twice}, row 1 already" in refused(engine(twice))
    assert "row 1: select = 'b' expects a `teacher` beside the text" in refused(engine(twice, "b"))
    odd = jsonl(tmp_path / "c.jsonl", {"prompt": "p", "sample": "0", "text": "x"})
    assert "row 1: `sample`: expected a number from 0, found text (0)" in refused(engine(odd))


def test_messages_that_end_with_the_assistant_are_a_trace(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": [*user("p"), {"role": "assistant", "content": "so"}], "answer": "4"})
    assert texts(engine(path), ask("p")) == [("p", 0, "so")]
    path = jsonl(tmp_path / "b.jsonl", {"messages": user("p")})
    assert "expected the last message to be the assistant's, the trace; found role 'user'" in refused(engine(path))


def test_our_own_traces_table_can_be_replayed_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "teacher=t").mkdir()
    row = {
        "trace_id": "x",
        "prompt_id": ask("p").prompt_id,
        "teacher": "t",
        "sample": 1,
        "text": "so",
        "finish_reason": "stop",
    }
    parquet(tmp_path / "teacher=t" / "part-0.parquet", row)
    (tmp_path / "teacher=t" / "manifest.json").write_text("{}")
    assert texts(engine(tmp_path), ask("p", 2)) == [("p", 1, "so")]


def test_a_doubled_think_becomes_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", target("<think>\n<think>\nhm <think>\n<think>"))
    assert texts(engine(path), ask("p")) == [("p", 0, "<think>\nhm <think>\n<think>")]


# ---------------------------------------------------------------- matching
@pytest.mark.parametrize("record", [{"problem": "p"}, {"prompt": [SYSTEM, *user("p")]}, {"prompt": user(" p\n")}])
@pytest.mark.parametrize("asked", [user("p"), [{"role": "system", "content": "Another."}, *user("p")]])
def test_a_system_message_does_not_break_the_match(tmp_path: Path, record: dict[str, Any], asked: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {**record, "text": "so"})
    assert texts(engine(path), ask(asked)) == [("p", 0, "so")]


def test_a_problem_matches_the_last_message_unless_two_conversations_end_with_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"problem": "p", "text": "so"}, {"problem": "z", "text": "z"})
    shot = [*user("1+1"), {"role": "assistant", "content": "2"}, *user("p")]
    other = [*user("2+2"), {"role": "assistant", "content": "4"}, *user("p")]
    assert texts(engine(path), ask(shot)) == [("p", 0, "so")]
    assert texts(engine(path), ask(shot), ask(other), ask("z")) == [("z", 0, "z")]


def test_a_prompt_that_a_chat_template_rendered_is_found_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SEARCHES", 1)  # the first row's surroundings are those of all
    rendered = "system\nThink.\nuser\n{}\nassistant\n"
    path = jsonl(
        tmp_path / "a.jsonl", *({"input": rendered.format(p), "output": f"to {p}"} for p in ("1+1", "21+1", "no", "3+3"))
    )
    asked = [ask([SYSTEM, *user(p)]) for p in ("1+1", "21+1", "3+3")]
    assert texts(engine(path), *asked) == [("1+1", 0, "to 1+1"), ("21+1", 0, "to 21+1"), ("3+3", 0, "to 3+3")]


@pytest.mark.parametrize(
    ("rendered", "found"),
    [
        ("<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n", "What is 1+1?"),
        ("[INST] What is 1+1? Be brief. [/INST]", "What is 1+1? Be brief."),
        ("What is 1+1?\n\n", "What is 1+1?"),
        ("user\nSo, 1+1\nassistant\n", "1+1"),
        ("user\nWhat is 11+1\nassistant\n", None),
        ("user\nWhat is 1+1+1\nassistant\n", None),
    ],
)
def test_of_the_prompts_inside_a_rendered_one_the_longest_whole_one_is_meant(
    tmp_path: Path, rendered: str, found: str | None
) -> None:
    asked = [ask(p) for p in ("1+1", "What is 1+1?", "What is 1+1? Be brief.", "z")]
    path = jsonl(tmp_path / "a.jsonl", {"prompt": rendered, "text": "so"}, {"prompt": "z", "text": "z"})
    assert [t for t in texts(engine(path), *asked) if t[0] != "z"] == ([] if found is None else [(found, 0, "so")])


# ---------------------------------------------------------------- what was recorded beside a trace
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_numbers_and_truth_values_beside_a_text_are_kept_as_recorded(tmp_path: Path, write: Any) -> None:
    row = {
        "prompt": "p",
        "completion": "so",
        "step": 10,
        "reward": 0.5,
        "right": True,
        "name": "x",
        "sample": 0,
        "none": None,
        "nan": float("nan"),
    }
    (got,) = samples(engine(write(tmp_path / f"a.{write.__name__}", row)), [ask("p")])
    assert json.loads(got.sampling) == {"recorded": {"step": 10, "reward": 0.5, "right": True}}


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_lists_beside_generations_are_recorded_of_each(tmp_path: Path, write: Any) -> None:
    row = {"problem": "p", "generations": ["a", "b"], "correctness_math_verify": [True, False], "correctness_llama": None,
           "finish_reasons": ["stop", "stop"], "correctness_count": 1, "odd": [1, 2, 3]}  # fmt: skip
    got = samples(engine(write(tmp_path / f"a.{write.__name__}", row)), [ask("p", 2)])
    assert [json.loads(s.sampling) for s in got] == [{"recorded": {"correctness_math_verify": v}} for v in (True, False)]


def test_what_was_recorded_survives_being_replayed_again(tmp_path: Path) -> None:
    (first,) = samples(engine(jsonl(tmp_path / "a.jsonl", {"prompt": "p", "text": "so", "score": 1.0})), [ask("p")])
    (again,) = samples(
        engine(jsonl(tmp_path / "b.jsonl", {"prompt": "p", "text": "so", "sampling": first.sampling})), [ask("p")]
    )
    assert json.loads(again.sampling) == {"recorded": {"score": 1.0}}


@pytest.mark.parametrize("sampling", ["{", "[1]", "hot", 3])
def test_a_sampling_that_is_no_object_is_refused(tmp_path: Path, sampling: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "text": "so", "sampling": sampling})
    assert f"{path}, row 1: `sampling`: expected an object in JSON, found" in refused(engine(path))


def test_no_match_at_all_shows_an_example_of_each_side(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "What is 1+1?", "text": "so"})
    said = refused(engine(path), ask("What is 1+1? End with the answer."))
    assert f"teacher 't': {path}: none of its 1 records matches one of the 1 prompts" in said
    assert "a record: 'What is 1+1?'\n" in said
    assert "a prompt: 'What is 1+1? End with the answer.'" in said


def test_what_matches_is_counted_and_finished_samples_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FLUSH_ROWS", 2)
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "text": f"t{i}"} for i in range(6)))
    it = engine(path)
    asks = [ask(f"p{i}") for i in range(5)]
    done = frozenset({(asks[0].prompt_id, 0)})
    assert [len(b) for b in it.run(asks, done)] == [2, 2]
    assert it.note == "a.jsonl: 5 of 6 records matched, 5 of 5 prompts have a trace; 1 records match no prompt"
    assert list(it.run(asks, frozenset((a.prompt_id, 0) for a in asks))) == []


# ---------------------------------------------------------------- bad files
def test_a_file_without_traces_says_what_it_has(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "4"}
    path = parquet(tmp_path / "a.parquet", row)
    with pytest.raises(UserError, match=r"no recorded trace recognised. Found: prompt, answer. Expected one of:"):
        engine(path)
    said = refused(engine(jsonl(tmp_path / "a.jsonl", row)))
    assert "a.jsonl, row 1: no recorded trace recognised. Found: prompt, answer." in said
    assert "generations: a list of texts" in said
    assert "row 1: no prompt. Expected one of prompt" in refused(engine(jsonl(tmp_path / "b.jsonl", {"text": "t"})))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (3, "`target`, content: expected text, or a list of one text per teacher, found a number"),
        (["a", 3], "`target`, content: expected text, found a number (3)"),
    ],
)
def test_a_target_of_another_type_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", target(content))
    assert f"{path}, row 1: {said}" in refused(engine(path, "1"))


def test_a_file_whose_texts_are_all_empty_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "text": ""}, {"prompt": "q", "text": None})
    assert "1 of 2 records match a prompt, and none has a trace" in refused(engine(path))


def test_the_content_id_is_that_of_the_file_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    def teacher(path: Path) -> Teacher:
        return Teacher.model_validate({"name": "t", "engine": {"type": "replay", "path": path}})

    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "text": "t"})
    first = content_id(teacher(path))
    jsonl(path, {"prompt": "p", "text": "u"})
    assert first != content_id(teacher(path))
    for call in (content_id, teacher_engine):
        with pytest.raises(UserError, match=r"nowhere.jsonl: no such file. Data files beside it: a.jsonl."):
            call(teacher(tmp_path / "nowhere.jsonl"))
