"""Verdicts that came with a trace."""

import json

import pytest

from pipeline.scorers.recorded import verdict


@pytest.mark.parametrize(
    ("value", "status", "reward"),
    [(True, "ok", 1.0), (False, "wrong", 0.0), (1, "ok", 1.0), (1.5, "ok", 1.5), (0.99, "wrong", 0.99), (-1, "wrong", -1.0)],
)
def test_true_or_one_and_more_is_right(value: float, status: str, reward: float) -> None:
    got = verdict(json.dumps({"temperature": 1, "recorded": {"score": value}}), "score")
    assert got is not None
    assert (got.status, got.reward, got.correct) == (status, reward, status == "ok")


@pytest.mark.parametrize("sampling", ["{}", '{"recorded": {"other": true}}', '{"score": 1}'])
def test_nothing_recorded_is_no_verdict(sampling: str) -> None:
    assert verdict(sampling, "score") is None
