"""Sources: real files in, prompts out, and a message that helps for whatever is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import content_id, gym_entries, merged_rows, read_source, split_prompts
from schemas.errors import UserError
from schemas.ids import prompt_id
from schemas.recipe import FileSource, GymSource
from schemas.tables import ARROW


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def source(path: Path, **more: Any) -> FileSource:
    return FileSource.model_validate({"type": "file", "name": "s", "path": path, "verifier": "v", **more})


def gym(*tasks: dict[str, Any], **more: Any) -> GymSource:
    return GymSource.model_validate({"type": "reasoning_gym", "name": "g", "verifier": "v", "tasks": tasks, **more})


def refused(it: FileSource | GymSource) -> str:
    with pytest.raises(UserError) as e:
        read_source(it)
    return str(e.value)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------- forms
@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?", "answer": "2"},
        {"prompt": "1+1?", "solution": "2"},
        {"problem": "1+1?", "answer": "2"},
        {"question": "1+1?", "answer": 2},
        {"question": "1+1?", "answer": 2.0},
        {"prompt": user("1+1?"), "solution": "2"},
        {"messages": user("1+1?"), "answer": "2"},
        {"messages": [*user("1+1?"), {"role": "assistant", "content": "It is 2."}], "solution": "2"},
        {"data_source": "d", "prompt": user("1+1?"), "reward_model": {"style": "rule", "ground_truth": "2"}},
    ],
)
def test_every_accepted_form_gives_the_same_prompt(tmp_path: Path, write: Any, row: dict[str, Any]) -> None:
    table = read_source(source(write(tmp_path / f"a.{write.__name__}", row)))
    assert table.schema.equals(ARROW["prompts"], check_metadata=False)
    (made,) = table.to_pylist()
    assert made["messages"] == user("1+1?")
    assert made["prompt_id"] == prompt_id(user("1+1?"))
    assert (made["answer"], made["verifier"], made["source"], made["split"]) == ("2", "v", "s", "train")


def test_a_gsm8k_answer_is_kept_exactly(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "Half of 84.\n#### 42"})
    assert read_source(source(path))["answer"].to_pylist() == ["Half of 84.\n#### 42"]


def test_an_openr1_row_keeps_its_solution_and_drops_its_traces(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "problem": "p", "solution": "worked", "answer": "4", "uuid": "u", "generations": ["t1", "t2"],
            "messages": [*user("p"), {"role": "assistant", "content": "t1"}], "correctness_count": 2,
        },
    )  # fmt: skip
    (made,) = read_source(source(path)).to_pylist()
    assert (made["messages"], made["answer"]) == (user("p"), "4")
    assert json.loads(made["metadata"]) == {"solution": "worked", "uuid": "u", "correctness_count": 2}


def test_a_verl_row_keeps_all_its_columns_but_prompt_and_target(tmp_path: Path) -> None:
    row = {
        "data_source": "d", "prompt": [{"role": "system", "content": "s"}, *user("p")], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"split": "train", "index": 7},
        "target": [{"role": "assistant", "content": "<think>\nlong"}],
    }  # fmt: skip
    (made,) = read_source(source(parquet(tmp_path / "a.parquet", row), system="mine")).to_pylist()
    assert made["messages"] == row["prompt"]  # has a system message already
    kept = {k: row[k] for k in ("data_source", "ability", "reward_model", "extra_info")}
    assert json.loads(made["metadata"]) == kept


def test_a_verl_gold_object_becomes_json(tmp_path: Path) -> None:
    row = {"prompt": user("p"), "reward_model": {"ground_truth": {"target": 24, "numbers": [1, 2]}}}
    (made,) = read_source(source(jsonl(tmp_path / "a.jsonl", row))).to_pylist()
    assert json.loads(made["answer"]) == {"target": 24, "numbers": [1, 2]}


def test_metadata_is_json_whatever_the_file_holds(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["p"], "answer": ["a"], "nan": [float("nan")], "blob": [b"123"],
            "when": pa.array([1], pa.timestamp("ns")), "day": pa.array([1], pa.date32()),
            "none": pa.array([None], pa.int32()),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    (made,) = read_source(source(tmp_path / "a.parquet")).to_pylist()
    found = json.loads(made["metadata"], parse_constant=pytest.fail)
    assert found == {"nan": None, "blob": "<3 bytes>", "when": found["when"], "day": "1970-01-02"}
    assert found["when"].startswith("1970-01-01")


def test_a_system_message_is_put_before_prompts_that_have_none(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"})
    (made,) = read_source(source(path, system="Be brief.")).to_pylist()
    assert made["messages"] == [{"role": "system", "content": "Be brief."}, *user("p")]


def test_a_folder_is_read_whole_and_limit_counts_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"})
    jsonl(tmp_path / "train-1.jsonl", {"prompt": "c", "answer": "1"}, {"prompt": "d", "answer": "1"})
    (tmp_path / "README.md").write_text("not data")
    assert read_source(source(tmp_path)).num_rows == 4
    assert [m[0]["content"] for m in read_source(source(tmp_path, limit=3))["messages"].to_pylist()] == ["a", "b", "c"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": "a"}\n\n{"prompt": "q", "answer": "b"}\n\n')
    assert read_source(source(path)).num_rows == 2


def test_the_content_id_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": "1"})
    b = jsonl(tmp_path / "b.jsonl", {"prompt": "p", "answer": "1"})
    first = content_id(source(a))
    assert first == content_id(source(b))
    jsonl(a, {"prompt": "p", "answer": "2"})
    assert content_id(source(a)) != first
    assert len(content_id(source(tmp_path))) == 64


# ---------------------------------------------------------------- bad files
def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"prompt": "p", "answer": "a"})
    said = refused(source(tmp_path / "trian.jsonl"))
    assert f"{tmp_path / 'trian.jsonl'}: no such file" in said
    assert "train.jsonl" in said
    assert "Correct `path`" in said


def test_an_unknown_extension_says_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tanswer\n")
    said = refused(source(tmp_path / "a.tsv"))
    assert "expected a .jsonl, .ndjson, .parquet or .csv file, found '.tsv'" in said
    assert "duckdb" in said


def test_an_empty_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert "no .jsonl, .parquet or .csv file in this folder" in refused(source(tmp_path / "d"))
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        assert "a." in (said := refused(source(tmp_path / name)))
        assert "empty" in said or "not readable as Parquet" in said
    (tmp_path / "b.jsonl").write_text("\n\n")
    assert "no row in the file" in refused(source(tmp_path / "b.jsonl"))
    pq.write_table(
        pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), tmp_path / "b.parquet"
    )
    assert "no row in the file" in refused(source(tmp_path / "b.parquet"))


def test_a_truncated_parquet_is_not_readable(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"prompt": "p", "answer": "a"})
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: not readable as Parquet" in refused(source(path))


def test_invalid_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "q",\n')
    said = refused(source(path))
    assert f"{path}, line 2: not valid JSON" in said
    assert "Expected one JSON object on each line" in said
    path.write_text('[\n{"prompt": "p"}\n]\n')
    assert "looks like one JSON array" in refused(source(path))
    path.write_text("[1]\n")
    assert f"{path}, line 1: expected a JSON object, found a list" in refused(source(path))
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert f"{path}, line 1: expected UTF-8" in refused(source(path))


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_columns_that_are_not_recognised_are_listed_with_the_accepted_forms(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / f"a.{write.__name__}", {"instruction": "p", "output": "a"})
    said = refused(source(path))
    assert f"{path}: columns not recognised: no problem and no answer. Found: instruction, output." in said
    assert "reward_model.ground_truth" in said
    assert "Rename the columns" in said
    path = write(tmp_path / f"b.{write.__name__}", {"prompt": "p", "gold": "a"})
    assert "columns not recognised: no answer. Found: prompt, gold." in refused(source(path))


# ---------------------------------------------------------------- bad rows
@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(("answer", "found"), [(None, "nothing"), (" ", "an empty text")])
def test_a_row_without_an_answer_is_named(tmp_path: Path, write: Any, answer: Any, found: str) -> None:
    path = write(tmp_path / f"a.{write.__name__}", {"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": answer})
    said = refused(source(path))
    assert f"{path}, row 2: no answer. Expected text or a number in `answer`, found {found}." in said
    assert "Give the row its gold answer, or delete it" in said


def test_a_verl_row_without_a_ground_truth_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": user(t), "reward_model": m} for t, m in (("p", {"ground_truth": "1"}), ("q", {"style": "rule"}))]
    said = refused(source(jsonl(tmp_path / "a.jsonl", *rows)))
    assert "row 2: no answer. Expected text or a number in `reward_model.ground_truth`" in said


def test_an_answer_that_is_a_list_is_refused(tmp_path: Path) -> None:
    said = refused(source(jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": ["1", "2"]})))
    assert "row 1: `answer`: expected text or a number as the answer, found a list" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": " \n", "answer": "1"}, "the prompt in `prompt` is empty"),
        ({"prompt": None, "answer": "1"}, "no prompt. Expected text or messages in `prompt`, found null"),
        ({"prompt": 3, "answer": "1"}, "`prompt`: expected text or messages, found a number (3)"),
        ({"messages": "p", "answer": "1"}, "`messages`: expected messages, found text (p)"),
        ({"messages": [], "answer": "1"}, "no prompt. Expected text or messages in `messages`, found a list"),
        ({"messages": user(" "), "answer": "1"}, "the prompt in `messages` is empty"),
        (
            {"prompt": [*user("p"), {"role": "assistant", "content": "x"}], "answer": "1"},
            "`prompt`: expected the last message to be the user's, found one of role 'assistant'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "answer": "1"},
            "`messages`: expected the last message to be the user's, found none but the assistant's",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
            "`messages`, message 1: expected {role, content}, both text; found role 'user', content a list",
        ),
        ({"prompt": "\ud83d half", "answer": "1"}, "`prompt`: expected valid Unicode, found half a character"),
    ],
)
def test_a_bad_prompt_is_named_with_its_row(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", row)
    found = refused(source(path))
    assert f"{path}, row 1: {said}" in found
    assert found.endswith("Correct the row, or delete it")


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_duplicate_prompts_name_both_rows_and_the_way_out_works(tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": t, "answer": a} for t, a in (("p", "1"), ("q", "2"), ("p", "3"), ("q", "2"))]
    path = write(tmp_path / f"a.{write.__name__}", *rows)
    said = refused(source(path))
    assert f"{path}, row 3: the same prompt as row 1 ('p'); 1 more rows repeat prompts." in said
    assert "Their answers differ ('1', '3')" in said
    command = said[said.index('python -c "') + len('python -c "') : said.rindex('")')]
    subprocess.run([sys.executable, "-c", command], check=True)
    unique = read_source(source(path.with_name(f"a.unique{path.suffix}")))
    assert unique["answer"].to_pylist() == ["1", "2"]


# ---------------------------------------------------------------- reasoning-gym
def test_gym_tasks_give_distinct_prompts_with_their_entries_and_worked_solutions() -> None:
    it = gym(
        {"name": "gsm_symbolic", "size": 4},
        {"name": "gcd", "size": 3, "settings": {"max_value": 20}},
        {"name": "string_splitting", "size": 2},
        {"name": "gcd", "size": 30, "settings": {"max_numbers": 2, "max_value": 2}},
        seed=5, suffix="\nEnd with the answer.", system="s",
    )  # fmt: skip
    table = read_source(it)
    assert table.schema.equals(ARROW["prompts"], check_metadata=False)
    rows = table.to_pylist()
    assert 10 <= len(rows) <= 13  # of the last task there are 4 different questions
    assert merged_rows(table) == 39 - len(rows)
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    for row in rows:
        entry = json.loads(row["metadata"])["entry"]
        assert row["messages"] == [{"role": "system", "content": "s"}, *user(entry["question"] + "\nEnd with the answer.")]
        assert row["answer"] == entry["answer"]
    first, fifth, last = (json.loads(rows[i]["metadata"]) for i in (0, 4, 8))
    assert first["task"] == "gsm_symbolic"
    assert first["solution"] == first["entry"]["metadata"]["answer_cot"]
    assert fifth["config"] == {"max_value": 20}
    assert "solution" not in fifth
    assert last["solution"].splitlines()[-1] == last["entry"]["answer"]


def test_gym_prompts_are_the_same_in_every_process_and_their_golds_pass_their_scorers() -> None:
    import reasoning_gym

    # of these, four iterate over sets and one draws from the global generator; arc_1d is an ordinary one
    names = ["ransom_note", "isomorphic_strings", "list_functions", "polynomial_multiplication", "arc_1d"]
    it = gym(*({"name": n, "size": 3} for n in names), seed=1)
    table = read_source(it)
    assert table.equals(read_source(it))
    for row in table.to_pylist():
        metadata = json.loads(row["metadata"])
        score: Any = reasoning_gym.get_score_answer_fn(metadata["task"])
        assert score(row["answer"], metadata["entry"]) == 1.0
    assert content_id(it) != content_id(it.model_copy(update={"seed": 2}))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "gsm_symbolik", "size": 1}, "no task 'gsm_symbolik'; did you mean gsm_symbolic"),
        ({"name": "gcd", "size": 1, "settings": {"most": 3}}, "task 'gcd': unknown setting 'most'. Known: max_numbers"),
        ({"name": "gcd", "size": 1, "settings": {"seed": 3}}, "(seed is the source's, size the task's)"),
        ({"name": "gcd", "size": 1, "settings": {"min_numbers": 0}}, "min_numbers must be at least 2. Correct"),
        ({"name": "graph_color", "size": 1}, "'graph_color' gives problems without a gold answer"),
    ],
)
def test_a_gym_task_that_cannot_be_made_is_refused(task: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        gym_entries(gym(task))
    assert said in str(e.value)


def test_what_a_gym_task_refuses_reaches_the_user_with_the_source() -> None:
    said = refused(gym({"name": "gsm_symbolik", "size": 1}))
    assert said.startswith("source 'g': tasks: reasoning_gym has no task 'gsm_symbolik'")


# ---------------------------------------------------------------- the split
def numbered(path: Path, n: int, prefix: str = "p") -> Path:
    return jsonl(path, *({"prompt": f"{prefix}{i}", "answer": "1"} for i in range(n)))


def split_of(*sources: FileSource) -> dict[str, str]:
    table = split_prompts([read_source(s) for s in sources], list(sources))
    assert table.schema.equals(ARROW["prompts"], check_metadata=True)
    return dict(zip(table["prompt_id"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_eval_rows_move_that_many_prompts_whatever_the_order_of_rows(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 50)
    first = split_of(source(path, eval_rows=10))
    assert sorted(first.values()) == ["eval"] * 10 + ["train"] * 40
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert split_of(source(path, eval_rows=10)) == first


def test_appended_rows_never_move_a_train_prompt_to_eval(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 50)
    before = split_of(source(path, eval_rows=10))
    numbered(path, 80)
    after = split_of(source(path, eval_rows=10))
    assert all(after[i] == "train" for i, side in before.items() if side == "train")


def test_eval_rows_that_leave_nothing_or_of_an_eval_source_are_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 5)
    with pytest.raises(UserError, match=r"'s': eval_rows = 5 of 5 prompts would leave nothing to train on. Lower"):
        split_of(source(path, eval_rows=5))
    with pytest.raises(UserError, match=r"'s': eval_rows = 2 belongs to a source with split = 'train'.*Remove eval_rows"):
        split_of(source(path, eval_rows=2, split="eval"))


def test_a_prompt_in_two_sources_is_refused_with_both_names(tmp_path: Path) -> None:
    a = source(jsonl(tmp_path / "a.jsonl", {"prompt": "same", "answer": "1"}), name="a")
    b = jsonl(tmp_path / "b.jsonl", {"prompt": "same", "answer": "1"})
    c = jsonl(tmp_path / "c.jsonl", {"prompt": "same", "answer": "2"})
    with pytest.raises(UserError, match=r"sources 'a' and 'b': the prompt 'same' stands in both, both with split 'train'"):
        split_of(a, source(b, name="b"))
    with pytest.raises(UserError, match=r"'a' \(train\) and 'b' \(eval\): the prompt 'same' stands on both sides"):
        split_of(a, source(b, name="b", split="eval"))
    with pytest.raises(UserError, match=r"'a' and 'c': .*different answers \('1', '2'\).*delete the prompt"):
        split_of(a, source(c, name="c"))


def test_a_system_message_does_not_hide_a_leak(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "same", "answer": "1"})
    train, held = source(path, name="a", system="Think."), source(path, name="b", split="eval")
    with pytest.raises(UserError, match=r"both sides of the split.*They differ in the system message alone"):
        split_of(train, held)
    assert set(split_of(train, source(path, name="b")).values()) == {"train"}
