"""Recorded outputs in the styles of reasoning models (tests/fixtures/outputs/think.jsonl, written by us): what is judged, and how."""

import json

import pytest
from pydantic import TypeAdapter

from pipeline.scorers import Item, score_item, vote
from schemas.scorers import ChoiceScorer, ExactScorer, GymScorer, MathScorer, ScorerConfig
from tests.tiny_runs import ROOT

OUTPUTS = [json.loads(line) for line in (ROOT / "tests" / "fixtures" / "outputs" / "think.jsonl").read_text().splitlines()]
CONFIG = TypeAdapter(ScorerConfig)


def verdict(config: ScorerConfig, text: str, answer: str, metadata: dict | None = None):
    return score_item(config, Item("i", text, answer, "v", "stop", "What?", metadata, "made"))


@pytest.mark.parametrize("it", OUTPUTS, ids=lambda it: it["case"])
def test_a_recorded_output_is_read_as_written_beside_it(it):
    got = verdict(CONFIG.validate_python(it["verifier"]), it["text"], it["answer"])
    assert (got.status, got.extracted) == (it["status"], it["extracted"])


def test_without_the_key_a_reasoning_gym_answer_may_stand_in_the_reasoning():
    entry = {"task": "chain_sum", "entry": {"question": "2 + 2 =", "answer": "4", "metadata": {}}}
    text = "<answer>5</answer>\n</think>\nIt is <answer>4</answer>."
    assert verdict(GymScorer(think="required"), text, "4", entry).status == "ok"
    assert verdict(GymScorer(think="required"), "<answer>4</answer>", "4", entry).status == "unparseable"
    assert verdict(GymScorer(), "<answer>4</answer>", "4", entry).status == "ok"


def test_equal_answers_vote_for_one_another():
    half = [r"\frac{1}{2}", "0.5", "1/2", r"\dfrac12", "0.50"]
    assert len({vote(MathScorer(), said, False) for said in half[:3] + half[4:]}) == 1
    assert len({vote(MathScorer(), said, True) for said in (*half, r"\frac{\sqrt{4}}{4}")}) == 1  # all are the gold answer
    assert vote(MathScorer(), "x + 1", False) == vote(MathScorer(), "x+1", False)
    assert vote(MathScorer(), "2", False) != vote(MathScorer(), "3", False)
    assert vote(ChoiceScorer(), "b", False) == vote(ChoiceScorer(), "B", False) == vote(ChoiceScorer(), "2", False)
    assert vote(ExactScorer(), " 7", False) == vote(ExactScorer(), "7", False)
    assert vote(GymScorer(), "a b", True) != vote(GymScorer(), "b a", True)  # several answers can be right there
    assert vote(MathScorer(), None, False) is None
