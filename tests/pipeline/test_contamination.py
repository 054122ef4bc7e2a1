"""Shared text between train and eval prompts: the query against the dumbest correct version, and what counts as the same."""

import random
from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contamination import COMMON, SHORTEST, contamination, normal_words
from schemas.tables import ARROW


def prompts(*rows: tuple[str, str, str]) -> pa.Table:
    """(split, id, text) as prompts; a source for each split."""
    made = [
        {"prompt_id": key, "messages": [{"role": "user", "content": text}], "answer": "1", "verifier": "v",
         "source": f"{split}_source", "split": split, "metadata": "{}"}
        for split, key, text in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=ARROW["prompts"])


def pairs(*rows: tuple[str, str, str], ngram: int = 13) -> list[tuple[str, str]]:
    return [(r["prompt_id"], r["eval_prompt_id"]) for r in contamination(prompts(*rows), ngram).to_pylist()]


# ---------------------------------------------------------------- the dumbest correct version
def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def by_hand(rows: list[tuple[str, str, str]], ngram: int) -> dict[tuple[str, str], tuple[int, float]]:
    """(train, eval) -> (length of the compared runs, overlap), by comparing everything with everything."""
    texts = {key: normal_words(text).split() for _, key, text in rows}
    train, evals = ([key for split, key, _ in rows if split == side and texts[key]] for side in ("train", "eval"))
    common: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for n in range(1, ngram + 1):
        for side, keys in enumerate((train, evals)):
            for key in keys:
                for run in runs(texts[key], n):
                    common[run][side] += 1
    out = {}
    for t in train:
        for e in evals:
            n = min(len(texts[t]), len(texts[e]), ngram)
            of_eval = runs(texts[e], n)
            shared = {run for run in runs(texts[t], n) & of_eval if max(common[run]) <= COMMON}
            if texts[t] == texts[e]:
                out[t, e] = (len(texts[e]), 1.0)
            elif n >= min(SHORTEST, ngram) and shared:
                out[t, e] = (n, len(shared) / len(of_eval))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 14), st.integers(1, 4))
def test_the_query_finds_what_comparing_everything_with_everything_finds(seed: int, ngram: int, letters: int) -> None:
    draw = random.Random(seed)
    alphabet = "abcdefgh"[: letters + 1]
    rows = []
    for split in ("train", "eval"):
        for i in range(draw.randint(1, 14)):
            words = [draw.choice(alphabet) for _ in range(draw.randint(0, 18))]
            if rows and draw.random() < 0.4:  # a piece of an earlier one
                other = draw.choice(rows)[2].split()
                at = draw.randint(0, max(0, len(other) - 1))
                words[draw.randint(0, len(words)) :] = other[at : at + draw.randint(1, 16)]
            rows.append((split, f"{split}{i}", f"{i % 3} {' '.join(words)}"))
    got = contamination(prompts(*rows), ngram).to_pylist()
    assert {(r["prompt_id"], r["eval_prompt_id"]): (r["words"], pytest.approx(r["overlap"])) for r in got} == by_hand(
        rows, ngram
    )
    texts = {key: normal_words(text) for _, key, text in rows}
    for r in got:
        assert len(r["run"].split()) == r["words"]
        assert f" {r['run']} " in f" {texts[r['prompt_id']]} "
        assert f" {r['run']} " in f" {texts[r['eval_prompt_id']]} "


# ---------------------------------------------------------------- what is the same
LONG = "Let $n$ be the smallest positive integer such that $n$ is divisible by 20, $n^2$ is a perfect cube, and $n^3$ is a square."


def test_a_problem_inside_another_is_found_whatever_its_layout() -> None:
    inside = "Here is one. " + LONG.replace("$", "").replace(",", "").upper() + " How many digits does it have?"
    assert pairs(("train", "t", inside), ("eval", "e", LONG)) == [("t", "e")]
    (row,) = contamination(
        prompts(("train", "t", LONG), ("eval", "e", LONG + " Find the number of digits of n.")), 13
    ).to_pylist()
    assert (row["source"], row["eval_source"], row["words"]) == ("train_source", "eval_source", 13)
    assert row["run"] in normal_words(LONG)
    assert 0.6 < row["overlap"] < 1


def test_another_number_or_sign_in_a_short_problem_is_another_problem() -> None:
    assert pairs(("train", "t", "What is 17 + 25?"), ("eval", "e", "What is 17 - 25?")) == []
    assert pairs(("train", "t", "What is 17 + 26?"), ("eval", "e", "What is 17 + 25?")) == []
    assert pairs(("train", "t", "what is $17+25$"), ("eval", "e", "What is 17 + 25 ?")) == [("t", "e")]


def test_a_short_problem_inside_a_longer_one_counts_from_eight_words_on() -> None:
    short = "Find 3 x + 5"
    assert pairs(("train", "t", f"{short} and more"), ("eval", "e", short)) == []
    eight = "Find the roots of x^2 - 5 = 0"
    assert pairs(("train", "t", f"Please: {eight}, then add them."), ("eval", "e", eight)) == [("t", "e")]
    assert pairs(("train", "t", eight), ("eval", "e", f"Please: {eight}, then add them.")) == [("t", "e")]


def test_an_instruction_of_a_source_is_no_part_of_its_problems() -> None:
    told = "Let's think step by step and output the final answer within \\boxed{}, and nothing else at all."
    train = [("train", f"t{i}", f"{i} + 1 = {i * 7}? {told}") for i in range(20)]
    evals = [("eval", f"e{i}", f"{told} {i} + 1 = {i * 7}?") for i in range(15, 40)]
    assert pairs(*train, *evals) == [(f"t{i}", f"e{i}") for i in range(15, 20)]


def test_a_set_phrase_pairs_nothing_and_does_not_hide_a_problem() -> None:
    phrase = "A train leaves the station at noon and travels towards the next town at a constant speed"
    train = [("train", f"t{i}", f"{i} {phrase} of {i} km per hour {i}") for i in range(COMMON + 2)]
    evals = [("eval", "e", f"99 {phrase} of 7 km per hour"), ("eval", "same", f"3 {phrase} of 3 km per hour 3")]
    found = pairs(*train, *evals)
    assert ("t3", "same") in found
    assert len(found) < 4


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("\\frac{1}{2}", "$\\dfrac12$"), ("2 \\times 3", "2\\cdot3"), ("\N{SUPERSCRIPT TWO}", "2"), ("x\N{MINUS SIGN}1", "X - 1"),
        ("\\left( a \\right)", "(a)"), ("a_1", "a_{1}"), ("\\text{cm}", "cm"), ("naïve \N{GREEK SMALL LETTER PI}", "NAÏVE \N{GREEK SMALL LETTER PI}"),
    ],
)  # fmt: skip
def test_layout_is_no_difference(a: str, b: str) -> None:
    assert normal_words(a) == normal_words(b) != ""


@pytest.mark.parametrize(
    ("a", "b"), [("x+1", "x-1"), ("12", "1 2"), ("a<b", "a>b"), ("\\leftarrow", "\\rightarrow"), ("10", "100")]
)
def test_what_changes_the_problem_is_a_difference(a: str, b: str) -> None:
    assert normal_words(a) != normal_words(b)
