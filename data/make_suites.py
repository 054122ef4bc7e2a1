"""Writes data/suites: a few problems of our own in the schemas of the public benchmarks, for tests.

    python data/make_suites.py               again, the same bytes
    python data/make_suites.py --out DIR     under DIR, to compare with what is committed

Every problem was made up for this file; none is from the data set whose columns it uses. Columns and types were read off the
data sets' own descriptions (docs/evaluation.md names them).
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent

Row = dict[str, Any]


def worked(id: int, problem: str, solution: str, answer: str) -> Row:
    url = f"https://example.org/made/{id}"
    return {"id": id, "problem": problem, "solution": solution, "answer": answer, "url": url, "year": "2024"}


AIME24 = [
    worked(60, "Find the number of ordered pairs $(a,b)$ of positive integers with $a + 2b = 101$.",
           "Here $b$ runs from 1 to 50, so the answer is $\\boxed{050}$.", "050"),
    worked(61, "Let $N$ be the sum of all positive divisors of $360$ that are multiples of $6$. Find the remainder when $N$ is "
               "divided by $1000$.", "They are $6d$ with $d \\mid 60$, so $N = 6 \\cdot 168 = 1008$: $\\boxed{008}$.", "008"),
    worked(62, "A box holds five red and four blue balls. Three are drawn at once. The probability that both colours are among them "
               "is $\\frac{m}{n}$ in lowest terms. Find $m+n$.", "$1 - \\frac{14}{84} = \\frac{5}{6}$, so $\\boxed{011}$.", "011"),
]  # fmt: skip
AIME25 = [
    {"problem": "Find the least positive integer $n$ for which $n^2+n$ is divisible by $210$.", "answer": "14", "id": "0"},
    {
        "problem": "How many three-digit integers have digits that strictly increase from left to right?",
        "answer": "84",
        "id": "1",
    },
    {"problem": "Both roots of $x^2-20x+c=0$ are primes. Find the sum of all possible $c$.", "answer": "142", "id": "2"},
]
AMC = [  # ids start again in the second year, as there
    {"id": 0, "problem": "What is the sum of the first $12$ odd positive integers?", "answer": 144.0, "url": "made/0"},
    {"id": 1, "problem": "How many edges has a prism whose base has $10$ sides?", "answer": 30.0, "url": "made/1"},
    {"id": 0, "problem": "A clock gains $3$ minutes every $4$ hours. How many in a day?", "answer": 18.0, "url": "made/2"},
]


def math(problem: str, solution: str, answer: str, subject: str, level: int, at: int) -> Row:
    folder = subject.lower().replace(" ", "_")
    return {
        "problem": problem, "solution": solution, "answer": answer, "subject": subject, "level": level,
        "unique_id": f"test/{folder}/made_{at}.json",
    }  # fmt: skip


MATH500 = [
    math(
        "Simplify $\\sqrt{72}-\\sqrt{8}$.", "$6\\sqrt{2}-2\\sqrt{2}=\\boxed{4\\sqrt{2}}$.", "4\\sqrt{2}", "Prealgebra", 2, 1
    ),
    math("For which $x$ is $|2x-3|<5$? Give an interval.", "$-5<2x-3<5$, so $\\boxed{(-1,4)}$.", "(-1,4)", "Algebra", 3, 2),
    math("What is $\\frac34$ of $\\frac29$?", "It is $\\boxed{\\frac{1}{6}}$.", "\\frac{1}{6}", "Prealgebra", 1, 3),
    math("Expand $(x-2)(x+5)$.", "$\\boxed{x^2+3x-10}$.", "x^2+3x-10", "Intermediate Algebra", 4, 4),
]
MINERVA = [
    {"question": "Light of wavelength 500 nm: what is its frequency in Hz, with $c = 3 \\times 10^{8}$ m/s? One significant figure.",
     "answer": "6e14"},
    {"question": "A mass $m$ hangs from a spring of constant $k$. What is its angular frequency of oscillation?",
     "answer": "\\sqrt{k/m}"},
    {"question": "A star is seen at a parallax of 0.05 arc seconds. How many parsecs away is it?", "answer": "20"},
]  # fmt: skip


def arc(id: str, question: str, texts: list[str], key: str, labels: str = "ABCDE") -> Row:
    return {
        "id": id,
        "question": question,
        "choices": {"text": texts, "label": list(labels[: len(texts)])},
        "answerKey": key,
    }


ARC = [
    arc("made_1", "Which of these is needed for a puddle to dry up in the shade?",
        ["moving water", "evaporation", "photosynthesis", "frost"], "B"),
    arc("made_2", "A magnet lifts one of these. Which one?", ["a cork", "a copper coin", "an iron nail", "a glass bead"], "3", "1234"),
    arc("made_3", "Which part of a plant takes up most of its water?", ["root", "flower", "leaf"], "A"),
    arc("made_4", "Which of these changes is chemical?",
        ["melting wax", "tearing paper", "boiling water", "rusting iron", "bending wire"], "D"),
]  # fmt: skip


def gpqa(id: str, domain: str, question: str, right: str, *wrong: str) -> Row:
    return {
        "Record ID": id, "Question": question, "Correct Answer": right,
        **{f"Incorrect Answer {i}": text for i, text in enumerate(wrong, 1)},
        "Explanation": "made up for tests", "High-level domain": domain, "Subdomain": "",
    }  # fmt: skip


GPQA = [
    gpqa("made1", "Physics", "A photon scatters at 90 degrees off an electron at rest. By how much does its wavelength grow?",
         "one Compton wavelength\n", "half a Compton wavelength", "two Compton wavelengths", "not at all"),
    gpqa("made2", "Chemistry", 'A student says, "the buffer has pH = pKa". What holds of it?',
         "acid and base are equally concentrated", "it holds no acid", "its capacity is nil", "its pH is 7"),
    gpqa("made3", "Biology", "A cross of AaBb with aabb gives parental types in 90 of 100 offspring.\nHow far apart are the loci?",
         "10 cM", "90 cM", "50 cM", "45 cM"),
]  # fmt: skip

PROVENANCE = """\
# Benchmarks in small

Written by `python data/make_suites.py`; do not edit. Three or four problems each, made up here in the columns and types of
the public data sets (docs/evaluation.md names them), so that tests read every schema without a download. No problem is
from those data sets, and a score on these files says nothing about anything.
"""


def write(folder: Path) -> None:
    """All files, each in its data set's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("aime24", AIME24), ("amc", AMC), ("arc_c", ARC)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    for name, rows in (("aime25", AIME25), ("math500", MATH500), ("minerva", MINERVA)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with (folder / "gpqa_diamond.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(GPQA[0]))
        writer.writeheader()
        writer.writerows(GPQA)
    (folder / "PROVENANCE.md").write_text(PROVENANCE, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make data/suites")
    parser.add_argument("--out", type=Path, default=HERE / "suites", help="folder to write into")
    write(parser.parse_args().out)
