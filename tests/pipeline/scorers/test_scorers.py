"""Each scorer on its own: every status that it can reach, and what it takes for the answer."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.scorers import (
    Item,
    check_gold,
    choice,
    exact,
    gym,
    math_answer,
    score_item,
    user,
    version,
)
from pipeline.scorers.base import last_boxed
from schemas.errors import UserError
from schemas.scorers import (
    STATUSES,
    ChoiceScorer,
    ExactScorer,
    GymScorer,
    MathScorer,
    ScorerConfig,
    UserScorer,
)
from tests.pipeline.scorers.answers import by_math_verify


def item(text, answer="1", metadata=None):
    return Item("i", text, answer, "v", "stop", "What is it?", metadata, "made")


def test_last_boxed_is_the_last_that_closes():
    text = r"\boxed{1} \boxed{\frac{1}{2}} \boxed{oops"
    assert last_boxed(text) == (10, 29, r"\frac{1}{2}")
    assert last_boxed(r"\boxed{\{1,2\}} } {") == (0, 15, r"\{1,2\}")
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{") is None


# math


@pytest.mark.parametrize(
    ("text", "answer", "status"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", "ok"),
        (r"so $\boxed{x+1}$.", "1+x", "ok"),
        ("The answer is 7", "7", "ok"),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", "ok"),
        (r"\boxed{2}", r"2\sqrt{3}", "wrong"),  # bare, math-verify would read this gold as 2
        (r"\boxed{(1,2)}", "(1,2)", "ok"),
        (r"\boxed{1,000}", "1000", "ok"),
        (r"\boxed{3}", "x=3", "ok"),
        (r"\boxed{12.}", "12", "ok"),
        (r"\boxed{12}", "12.", "ok"),
        (r"\boxed{4}", "5", "wrong"),
        (r"\boxed{2\sqrt{3}}", r"3\sqrt{2}", "wrong"),
        ("I do not know.", "5", "unparseable"),
        ("", "5", "unparseable"),
        (r"\boxed{???}", "5", "unparseable"),
        (r"\boxed{5}", "", "gold_bad"),
        (r"\boxed{5}", "???", "gold_bad"),
        (r"\boxed{\frac{1}", r"\frac{1", "gold_bad"),
    ],
)
def test_math(text, answer, status):
    verdict = math_answer.score(text, answer)
    assert verdict.status == status
    assert verdict.reward == float(status == "ok")
    assert (check_gold(MathScorer(), answer, None) is not None) == (status == "gold_bad")


BOXES = [
    r"5|5",
    r"5|6",
    r"-5|5",
    r"-5|-5",
    r"0|-0",
    r"007|7",
    r"5.0|5",
    r"0.5|0.50",
    r"0.5|0.25",
    r"1,000|1000",
    r"1000|1,000",
    r"1,000|1,001",
    r"3.14|3.141",
    r"0.333333|0.3333334",
    r"1000000|1000001",
    r"123456789012|123456789013",
    r"\frac12|\frac{1}{2}",
    r"\dfrac{1}{2}|\frac{1}{2}",
    r"\frac{1}{2}|0.5",
    r"(1,2)|(1,2)",
    r"(1,\,2)|(1,2)",
    r"\left(1,2\right)|(1,2)",
    r"(2,1)|(1,2)",
    r"x+1|x+1",
    r"x|y",
    r"x=5|5",
    r"5|x=5",
    r"\{1,2\}|\{2,1\}",
    r"\sqrt{8}|2\sqrt{2}",
    r"50\%|50\%",
    r"50|50\%",
    r"0.5|50\%",
    r"3|\text{three}",
    r"\pi|\pi",
    r"90^\circ|90",
    r"1/2|\frac{1}{2}",
    r"2^{10}|1024",
    r"-\frac{1}{2}|-0.5",
    r"0.0000001|0",
    r"1e5|100000",
]

WRAPPINGS = [
    r"So \boxed{{{}}}.",
    r"Then $\boxed{{{}}}$",
    r"First \boxed{{17}}. No: \[\boxed{{{}}}\]",
    r"\boxed{{3}} and \boxed{{{}}}",
    r"$\boxed{{3}}$ and $\boxed{{{}}}$",
    r"$x = \boxed{{{}}}$ since $x > 2$.",
    r"$\boxed{{{}}} + 1$",
    r"\boxed{{{}}}\%",
    r"$\boxed{{{}}}$ percent",
    r"The final answer is $\boxed{{{}}}$. I hope it is correct.",
    r"The final answer is 4. I hope it is correct. \boxed{{{}}}",
    r"\boxed{{{}}} but the final answer is 5",
    "Long. " * 100 + r"**Answer:** \boxed{{{}}}" + "\nDone.",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # sympy, where a percent sign follows a set
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_quick_decision_agrees_with_math_verify(wrapping):
    for pair in BOXES:
        box, gold = pair.split("|")
        text = wrapping.format(box)
        decided = math_answer.score(text, gold)
        assert decided.correct == by_math_verify(text, gold), (text, gold)


@settings(max_examples=150, deadline=None)
@given(st.decimals(-2000, 2000, places=3), st.decimals(-2000, 2000, places=3), st.booleans())
def test_two_plain_numbers_are_equal_when_their_decimals_are(left, right, same):
    right = left if same else right
    assert math_answer.score(f"\\boxed{{{left}}}", str(right)).correct == (left == right)
    assert by_math_verify(f"\\boxed{{{left}}}", str(right)) == (left == right)


@pytest.mark.parametrize(
    "text",
    [
        "$" * 50_000,
        "\\boxed{" * 9_000,
        "(" * 400,
        "{" * 20_000,
        "answer " * 10_000,
        "\x00\ud800 \\boxed{1}",
        "1+" * 900,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_adversarial_texts_end_in_a_verdict(text):
    started = time.monotonic()
    for config in (MathScorer(), ChoiceScorer(), ExactScorer(extract=r"(\d+)")):
        assert score_item(config, item(text, "7" if config.type != "choice" else "B")).status in STATUSES
    assert time.monotonic() - started < 20


# exact


@pytest.mark.parametrize(
    ("text", "answer", "extract", "status", "extracted"),
    [
        (" 42\n", "42", None, "ok", "42"),
        ("it is 42", "42", None, "wrong", "it is 42"),
        ("a = 1, b = 42", "42", r"= (\d+)", "ok", "42"),
        ("b = 42, a = 1", "42", r"= (\d+)", "wrong", "1"),
        ("nothing", "42", r"= (\d+)", "unparseable", None),
        ("x", "42", r"x(\d+)?", "unparseable", None),
        ("  ", "42", None, "unparseable", None),
        ("42", " ", None, "gold_bad", None),
    ],
)
def test_exact(text, answer, extract, status, extracted):
    verdict = exact.score(text, answer, extract=extract)
    assert (verdict.status, verdict.extracted) == (status, extracted)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_exact_is_equality_after_stripping(text, answer):
    verdict = exact.score(text, answer)
    assert verdict.correct == (text.strip() == answer.strip() != "")


# choice


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ANSWER: B", "B"),
        ("Answer: **B**", "B"),
        ("**Answer:** B", "B"),
        ("The answer is B.", "B"),
        ("the answer is (b)", "b"),
        ("The correct answer is: (B) Paris", "B"),
        ("The answer is A because it rains", "A"),
        ("so \\boxed{B}", "B"),
        ("so $\\boxed{\\text{B}}$", "B"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("<answer> B </answer>", "B"),
        ("<answer>(b)</answer>", "b"),
        ("Not (A), rather (B)", "B"),
        ("B", "B"),
        ("Thinking.\nB.", "B"),
        ("The answer is A. Wait, no. ANSWER: C", "C"),
        ("ANSWER: C (not (D))", "C"),
        ("I choose option D", None),
        ("The correct option is D", "D"),
        ("The answer is a prime number", None),
        ("The answer is A good one", None),
        ("The answer is I think unclear", None),
        ("Answer: Berlin", None),
        ("the answer is 2", None),
        ("", None),
    ],
)
def test_choice_finds_what_the_text_settles_on(text, found):
    verdict = choice.score(text, "B")
    assert verdict.extracted == found
    assert verdict.status == ("unparseable" if found is None else "ok" if found in "Bb" else "wrong")


@pytest.mark.parametrize(
    ("answer", "text", "status"),
    [
        ("2", "ANSWER: B", "ok"),
        ("2", "ANSWER: 2", "ok"),
        ("3", "the answer is (2)", "wrong"),
        ("(b)", "ANSWER: B", "ok"),
        ("B.", "ANSWER: B", "ok"),
        ("0", "ANSWER: B", "gold_bad"),
        ("BC", "ANSWER: B", "gold_bad"),
        ("", "ANSWER: B", "gold_bad"),
        ("é", "ANSWER: B", "gold_bad"),
    ],
)
def test_choice_takes_letters_and_digits_as_gold(answer, text, status):
    assert choice.score(text, answer).status == status
    assert (check_gold(ChoiceScorer(), answer, None) is not None) == (status == "gold_bad")


# reasoning_gym


@pytest.mark.parametrize("task", ["chain_sum", "rearc", "countdown"])
def test_gym_takes_a_tasks_own_answer_after_a_trip_through_json(task):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
    metadata = json.loads(json.dumps({"task": task, "entry": entry}, default=str))
    right = gym.score(f"Let me see.\n<answer>{entry['answer']}</answer>", metadata)
    assert (right.status, right.reward) == ("ok", 1.0)
    assert gym.score("<answer>not this</answer>", metadata).status == "wrong"


def test_gym_keeps_partial_credit_as_the_reward_of_a_wrong_answer():
    metadata = {"task": "chain_sum", "entry": {"question": "", "answer": "-4", "metadata": {}}}
    verdict = gym.score("<answer>-4, I think</answer>", metadata)
    assert (verdict.status, verdict.correct) == ("wrong", False)
    assert 0 < verdict.reward < 1
    assert gym.score("  ", metadata).status == "unparseable"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"task": "chain_sum"},
        {"task": "chain_sum", "entry": 3},
        {"task": "chain_sum", "entry": {}},
        {"task": "no_such_task", "entry": {"answer": "1"}},
    ],
)
def test_gym_without_a_task_and_its_entry_has_no_gold(metadata):
    assert gym.score("<answer>1</answer>", metadata).status == "gold_bad"
    assert check_gold(GymScorer(), "1", metadata)


def test_gym_scorer_trouble_is_an_error():
    metadata = {"task": "chain_sum", "entry": {"answer": None}}
    assert score_item(GymScorer(), item("<answer>1</answer>", metadata=metadata)).status == "error"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> \\boxed{2}", "1"),
        ("<answer>1</answer><answer>\n2\n</answer>", "2"),
        ("the answer is 3 \\boxed{2}", "2"),
        ("Answer: 2\nno, the answer is: 3", "3"),
        ("**Answer:** 3", "3"),
        ("first\n second \n", "second"),
        ("", ""),
    ],
)
def test_gym_extracts_in_order_of_explicitness(text, answer):
    assert gym.extract(text) == answer


# user


def written(tmp_path, source, name="f", **options):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return UserScorer(function=f"{path}:{name}", **options)


def test_trls_signature_with_messages(tmp_path):
    config = written(
        tmp_path,
        "def f(completions, solution, **columns):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    assert columns['level'] == [3] and columns['prompts'][0][-1]['role'] == 'user'\n"
        "    return [1.0 if s in t else 0.25 for t, s in zip(texts, solution)]\n",
    )
    assert score_item(config, item("it is 1", metadata={"level": 3})).status == "ok"
    verdict = score_item(config, item("it is 2", metadata={"level": 3}))
    assert (verdict.status, verdict.reward) == ("wrong", 0.25)


def test_trls_signature_with_plain_text_and_only_the_columns_it_takes(tmp_path):
    config = written(
        tmp_path,
        "def f(prompts, completions, answer):\n    return [float(completions == answer)]\n",
    )
    assert score_item(config, item("1", metadata={"level": 3})).status == "ok"
    forced = config.model_copy(update={"completions": "messages"})
    assert score_item(forced, item("1")).status == "wrong"


def test_verls_signature_with_a_number_or_a_dict(tmp_path):
    config = written(
        tmp_path,
        "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == 'made'\n"
        "    right = solution_str == ground_truth\n"
        "    return {'score': 0.6 * right, 'acc': right} if extra_info else right\n",
        correct_at=0.5,
    )
    assert score_item(config, item("1")).reward == 1.0
    verdict = score_item(config, item("1", metadata={"a": 1}))
    assert (verdict.status, verdict.reward) == ("ok", 0.6)
    assert score_item(config, item("2", metadata={"a": 1})).status == "wrong"


@pytest.mark.parametrize(
    ("returned", "detail"),
    [
        ("None", "expected a list"),
        ("[None]", "the function returned None"),
        ("[1.0, 2.0]", "expected a list with one value"),
        ("[float('nan')]", "returned nan"),
        ("[float('-inf')]", "returned -inf"),
        ("['1']", "not a number"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_no_number_is_an_error_and_says_so(tmp_path, returned, detail):
    verdict = score_item(written(tmp_path, f"def f(completions): return {returned}"), item("1"))
    assert verdict.status == "error"
    assert detail in verdict.detail


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def g(completions, solution): ...", "has no f; its functions: g"),
        ("def f(a, b): ...", r"expected TRL's .* or verl's .* found parameters \(a, b\)"),
        ("import not_installed_anywhere", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("def f(:", "SyntaxError"),
        ("f = 3", "f is a int, not a function"),
        ("async def f(completions): ...", "async functions are not supported"),
    ],
)
def test_a_bad_user_file_says_what_is_wrong_with_it(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        user.load(written(tmp_path, source))


def test_a_user_file_can_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("value = 1")
    config = written(tmp_path, "import neighbour_of_mine as n\ndef f(completions): return [n.value]")
    assert score_item(config, item("1")).status == "ok"


def test_an_edited_user_file_has_another_hash(tmp_path):
    first = user.source_hash(written(tmp_path, "def f(completions): return [1]"))
    assert user.source_hash(written(tmp_path, "def f(completions): return [0]")) != first
    with pytest.raises(UserError, match="cannot read"):
        user.source_hash(UserScorer(function="nowhere.py:f"))


# configuration


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "maths"},
        {"type": "math", "extract": "x"},
        {"type": "exact", "extract": "("},
        {"type": "exact", "extract": "no group"},
        {"type": "exact", "extract": "(two) (groups)"},
        {"type": "user"},
        {"type": "user", "function": "file.py"},
        {"type": "user", "function": "module:f"},
        {"type": "user", "function": "file.py:f", "correct_at": float("nan")},
    ],
)
def test_a_wrong_verifier_entry_is_refused(entry):
    with pytest.raises(ValidationError):
        TypeAdapter(ScorerConfig).validate_python(entry)


def test_the_type_picks_the_scorer_and_each_has_a_version():
    for entry in ["math", "exact", "choice", "reasoning_gym"]:
        config = TypeAdapter(ScorerConfig).validate_python({"type": entry})
        assert config.type == entry
        assert version(config) >= 1
    assert version(UserScorer(function="a.py:f")) >= 1
