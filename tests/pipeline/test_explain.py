"""One prompt's whole story: every row that names it, and a sentence that says why it was trained on or not."""

import io
import json

import pyarrow as pa
import pytest
from rich.console import Console

from pipeline.explain import explain, render_explain
from schemas.errors import UserError
from tests import synthetic_run


def drawn(d, width=160):
    out = io.StringIO()
    Console(file=out, width=width).print(render_explain(d))
    return " ".join(out.getvalue().split())


@pytest.fixture(scope="module")
def by_reason(synthetic):
    """One prompt for each reason of round 1 (each reason of the closed set occurs there or in round 0)."""
    rows = synthetic.execute("select reason, min(prompt_id), max(round) from grades group by reason").fetchall()
    return {reason: prompt for reason, prompt, _ in rows}


def test_a_mid_prompt_shows_its_group_its_shard_rows_and_its_steps(synthetic, by_reason):
    d = explain(synthetic, by_reason["rl"])
    at = next(r for r in d["rounds"] if r["grade"]["reason"] == "rl")
    assert len(at["rollouts"]) == len(at["shards"]) == at["grade"]["k"] == synthetic_run.K
    assert {s["item_id"] for s in at["shards"]} == {r["rollout_id"] for r in at["rollouts"]}
    assert sum(r["correct"] for r in at["rollouts"]) == at["grade"]["successes"]
    assert all(s["w_grpo"] == s["w_gal"] == 1 and s["w_sft"] == 0 for s in at["shards"])
    assert sum(s["advantage"] for s in at["shards"]) == pytest.approx(0, abs=1e-6)
    steps = synthetic.execute(
        "select distinct step from draws where prompt_id = $p and round = $r order by step",
        {"p": d["prompt"]["prompt_id"], "r": at["round"]},
    ).fetchall()
    assert {x["step"] for x in at["draws"]} == {s for (s,) in steps}
    assert at["why"].startswith("goes to rl: Mid")
    assert len(d["traces"]) == 3


def test_a_hard_prompt_names_the_teacher_that_it_learns_from(synthetic, by_reason):
    d = explain(synthetic, by_reason["sft"])
    at = next(r for r in d["rounds"] if r["grade"]["reason"] == "sft")
    verified = {t["trace_id"]: t["teacher"] for t in d["traces"] if t["correct"]}
    assert {s["item_id"]: s["teacher"] for s in at["shards"]} == verified
    assert len(verified) == at["grade"]["traces"]


def test_every_reason_has_its_sentence(synthetic, by_reason):
    assert set(by_reason) == set(synthetic_run.REASONS)
    for reason, prompt in by_reason.items():
        whys = [r["why"] for r in explain(synthetic, prompt)["rounds"] if r["grade"]["reason"] == reason]
        assert whys, reason
        for why in whys:
            assert why != reason
            assert why.startswith(f"goes to {reason}" if reason in ("rl", "sft") else "not trained on: ")


def test_the_dict_is_json_and_the_drawing_is_of_it(synthetic, by_reason):
    for prompt in by_reason.values():
        d = explain(synthetic, prompt)
        again = json.loads(json.dumps(d))
        assert again == d
        text = drawn(again)
        assert prompt in text
        for at in d["rounds"]:
            for r in at["rollouts"]:
                assert r["rollout_id"][:8] in text
                assert (r["status"]) in text


def test_an_eval_prompt_shows_its_evals(synthetic):
    ((prompt,),) = synthetic.execute("select min(prompt_id) from prompts where source = 'held_out'").fetchall()
    d = explain(synthetic, prompt)
    assert d["rounds"] == d["traces"] == []
    assert len(d["evals"]) == 3 * synthetic_run.SAMPLES
    assert d["why"].startswith("an eval prompt")
    assert "sums" in drawn(d)


def test_a_prefix_that_one_prompt_has_is_enough(synthetic, by_reason):
    prompt = by_reason["rl"]
    assert explain(synthetic, f" {prompt[:12].upper()} ")["prompt"]["prompt_id"] == prompt


def test_an_ambiguous_prefix_lists_whom_it_may_mean(synthetic):
    counts = synthetic.execute(
        "select prompt_id[1:1] as p, count(*), min(prompt_id) from prompts group by p having count(*) > 1 order by 2 desc, 1"
    ).fetchall()
    prefix, count, first = counts[0]
    with pytest.raises(UserError, match="several prompts begin so") as e:
        explain(synthetic, prefix)
    assert first in str(e.value)
    assert str(e.value).count("\n") == min(count, 6)
    assert e.value.exit_code == 2


def test_an_unknown_id_names_the_nearest(synthetic, by_reason):
    prompt = by_reason["rl"]
    with pytest.raises(UserError, match="no prompt begins so") as e:
        explain(synthetic, prompt[:10] + "xyz")
    assert str(e.value).splitlines()[1].split()[0] == prompt


@pytest.mark.parametrize("wanted", ["", "  "])
def test_an_empty_id_is_refused(synthetic, wanted):
    with pytest.raises(UserError, match="found an empty text"):
        explain(synthetic, wanted)


def test_a_run_without_prompts_says_what_to_do(synthetic):
    with pytest.raises(UserError, match="dypo ingest"):
        explain(synthetic_run.connect(synthetic_run.empty_tables()), "abc")


def test_a_prompt_without_rollouts_says_so():
    tables = synthetic_run.build_tables()
    only = {**synthetic_run.empty_tables(), "prompts": tables["prompts"]}
    d = explain(synthetic_run.connect(only), tables["prompts"]["prompt_id"][3].as_py())
    assert d["why"] == "no rollouts yet"
    assert d["rounds"] == []
    assert "no rollouts yet" in drawn(d)


def test_an_ungraded_round_says_what_is_missing():
    tables = synthetic_run.build_tables()
    some = {**synthetic_run.empty_tables(), **{n: tables[n] for n in ("prompts", "rollouts")}}
    d = explain(synthetic_run.connect(some), tables["prompts"]["prompt_id"][3].as_py())
    assert d["rounds"][0]["why"] == "not graded in this round: score and grade its rollouts"
    assert "not scored" in drawn(d)


@pytest.mark.parametrize(
    ("why", "source", "drawn_now", "grade", "chance", "told"),
    [
        ("sure", 1, 2, "hard", 0.913, ["only 2 of 4 rollouts were drawn", "sure, with a chance of 0.91", "hard"]),
        ("unmoved", 0, 0, "easy", None, ["graded on the rollouts of round 0: unmoved, it was easy there"]),
        ("unmoved", 0, 0, "easy", 0.88, ["rollouts of round 0: unmoved", "not drawn to its end, easy with a chance of 0.88"]),
        ("budget", 0, 0, "mid", None, ["graded on the rollouts of round 0: the round's token budget did not reach it"]),
        ("stale", 0, 0, "mid", None, ["graded on the rollouts of round 0", "token budget", "too old to train on"]),
    ],
)  # fmt: skip
def test_a_group_that_was_not_drawn_whole_says_whose_rollouts_stand_for_it_and_why(
    why, source, drawn_now, grade, chance, told
):
    tables = synthetic_run.build_tables()
    prompt = tables["grades"]["prompt_id"][0].as_py()
    row = {"prompt_id": prompt, "round": 1, "source_round": source, "draws": drawn_now, "skipped": 4 - drawn_now}
    row |= {"grade": grade, "chance": chance, "why": why}
    tables["skips"] = pa.Table.from_pylist([row], schema=synthetic_run.ARROW["skips"])
    d = json.loads(json.dumps(explain(synthetic_run.connect(tables), prompt)))
    before, at = d["rounds"]
    assert before["skip"] is None
    assert at["skip"] == {key: value for key, value in row.items() if key not in ("prompt_id", "round")}
    assert at["grade"] is not None
    for words in told:
        assert words in at["why"]
        assert words in drawn(d, width=400)


def test_hostile_text_is_neither_markup_nor_terminal_escape(synthetic):
    ((prompt,),) = synthetic.execute(
        "select prompt_id from prompts where contains(messages[1].content, '<script>')"
    ).fetchall()
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=True).print(render_explain(explain(synthetic, prompt)))
    assert "[bold]b[/bold]" in out.getvalue()
    assert "\x1b[31mred" not in out.getvalue()
    assert "␛[31mred␀" in out.getvalue()
