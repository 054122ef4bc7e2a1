"""How `dypo probe variance` puts what was measured into words."""

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline.probe import render

Cell = dict[str, float | None]


def cell(value: float | None, low: float | None = None, high: float | None = None) -> Cell:
    return {"value": value, "ci_low": low, "ci_high": high}


def found(**changes: Any) -> dict[str, Any]:
    numbers = {"trace_cov": cell(2, 1, 3), "signal": cell(0.5, 0.25, 1), "noise_to_signal": cell(4, 2, None)}
    eq19 = {
        "variance_ratio": cell(1.25, 1.125, 1.5),
        "if_independent": cell(0.5, 0.25, 0.75),
        "noise_correlation": cell(0.875, 0.75, 1),
        "cosine": cell(None),
        "noise_to_signal_grpo": cell(4, 2, None),
        "noise_to_signal_mix": cell(5, 3, None),
        "noise_to_signal_ratio": cell(1.25, 0.5, 2),
        "best_alpha": cell(0.75, 0.25, 1),
        "noise_to_signal_best": cell(0.96875, 0.875, 1),
    }
    result = {
        "round": 3,
        "step": 0,
        "policy": "0123456789abcdef",
        "on_policy": True,
        "min_prompts": 10,
        "left_one_out": False,
        "parameters": 5000,
        "sketch": 1024,
        "gated": {"rl": 40, "sft": 7},
        "prompts": {"rl": 32, "sft": 0},
        "weights": {"grpo": 0.5, "gal": 0.5},
        "components": {name: numbers | {"prompts": 32, "direction_variance": cell(0.9)} for name in ("grpo", "gal", "mix")},
        "pairs": [{"a": "grpo", "b": "gal", "cosine": cell(0.5, 0.25, 0.75), "noise_correlation": None}],
        "eq19": eq19,
        "sampling": {
            "group_sizes": [4],
            "prompts": 21,
            "splits": 4,
            "components": {"grpo": numbers},
            "eq19": eq19 | {"noise_correlation": cell(0.8125, 0.75, 1)},
        },
    }
    return result | changes


def drawn(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(found(**changes)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def claim(ratio: Cell, relative: Cell) -> str:
    eq19 = found()["eq19"] | {"variance_ratio": ratio, "noise_to_signal_ratio": relative}
    text = drawn(eq19=eq19, sampling=None)
    return next(line for line in text.splitlines() if "rows" in line and ";" in line)


def test_what_was_measured_is_named_with_intervals_and_what_is_not_measurable_says_so() -> None:
    text = drawn()
    assert "round 3, at the policy that sampled it (0123456789ab)" in text
    assert "32 of 40 Mid prompts, 0 of 7 Hard ones; 5,000 parameters, gradients sketched to 1,024 numbers" in text
    assert "2 [1, 3]" in text
    assert "4 [2, inf]" in text
    assert "tr Cov(0.5 GRPO + 0.5 GAL) / tr Cov(GRPO) = 1.25 [1.12, 1.5]" in text
    assert "cosine of the means not measurable" in text
    assert "sampling noise at group size 4, 21 prompts" in text
    assert "noise correlation 0.812" in text
    assert "exact gradients" in drawn(sketch=None)
    assert "at step 5 (0123456789ab), not the policy that sampled it" in drawn(step=5, on_policy=False)


@pytest.mark.parametrize(
    ("ratio", "relative", "words"),
    [
        ((1.25, 1.125, 1.5), (1.2, 1.1, 1.3), ("does not hold", "varies more than GRPO; and", "more too")),
        ((1.25, 1.125, 1.5), (0.8, 0.7, 0.9), ("does not hold", "varies more than GRPO; but", "less.")),
        ((0.5, 0.25, 0.75), (1.2, 1.1, 1.3), ("claim holds", "varies less than GRPO; but", "more.")),
        ((0.5, 0.25, 0.75), (0.8, 0.7, 0.9), ("claim holds", "varies less than GRPO; and", "less too")),
        ((0.5, 0.25, 0.75), (0.8, 0.7, None), ("claim holds", "no difference is shown")),
        ((0.9, 0.7, 1.2), (1.1, 0.9, 1.3), ("do not decide", "no difference is shown")),
        ((1.1, 0.9, 1.5), (None, 0, None), ("do not decide", "no difference is shown")),
    ],
)
def test_the_claim_is_judged_by_its_interval_and_so_is_the_noise_beside_its_signal(
    ratio: tuple, relative: tuple, words: tuple[str, ...]
) -> None:
    line = claim(cell(*ratio), cell(*relative))
    for word in words:
        assert word in line


def test_what_is_left_out_has_its_reason() -> None:
    text = drawn(sampling=None)
    assert "SFT (Hard prompts): not measured, 7 prompts; at least 10 are needed" in text
    assert "within prompts: not measured, fewer than 10 groups of even size" in text
    components = found()["components"]
    assert "GAL's weight in the loss is 0" in drawn(
        components={"grpo": components["grpo"]}, eq19=None, pairs=[], sampling=None
    )
    text = drawn(prompts={"rl": 0, "sft": 12}, gated={"rl": 2, "sft": 12}, eq19=None, pairs=[], sampling=None, components={})
    assert "GRPO, GAL and mix (Mid prompts): not measured, 2 prompts" in text
