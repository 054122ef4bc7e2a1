"""`dypo score`'s math verdicts beside plain math-verify: the same rows, the same number of processes, one run.

    python -m tests.bench.score [--problems N] [--workers N] [--repeat N] [--json]        or  make bench-score

20,000 rollouts as default: 2,500 problems x 8, whose gold answers are numbers, fractions, radicals, sets, intervals and words, and
whose responses are right, right in another spelling, wrong, garbage, or without an answer, after a few lines of working with
formulas in them. Plain: math-verify's parse and verify on every row, gold in a box, its own timers off as ours are.
Both pools are warm before the clock starts. Verdicts have to be the same, row by row.
Left out: reading and writing Parquet (bench-store has that), and answers that hang.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from pipeline.scorers import Item, VerdictPool
from schemas.scorers import MathScorer

KINDS = ("number", "fraction", "radical", "set", "interval", "word")
WEIGHTS = (40, 20, 12, 10, 10, 8)
WORDS = ("east", "west", "odd", "even", "monday", "red", "blue", "circle", "square", "prime")


def _answer(kind: str, rng: random.Random) -> tuple[str, str, str]:
    """A gold answer, the same in another spelling, and a wrong one that looks alike."""
    a, b, c = rng.randint(2, 97), rng.randint(2, 19), rng.randint(2, 9)
    match kind:
        case "number":
            n = rng.choice([a, -a, a * 1000 + b, a / 4])
            return f"{n}", f"{n}.0" if isinstance(n, int) else f"{n}0", f"{n + c}"
        case "fraction":
            return rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a * c}}}{{{b * c}}}", rf"\frac{{{a}}}{{{b + 1}}}"
        case "radical":
            return rf"{c}\sqrt{{{b}}}", rf"\sqrt{{{c * c * b}}}", rf"{c + 1}\sqrt{{{b}}}"
        case "set":
            return rf"\{{{a}, {-b}, {a + c}\}}", rf"\{{{a + c}, {a}, {-b}\}}", rf"\{{{a}, {-b}, {a + c + 1}\}}"
        case "interval":
            return rf"[{-b}, {a})", rf"\left[{-b},{a}\right)", rf"[{-b}, {a}]"
        case _:
            word = rng.choice(WORDS)
            return rf"\text{{{word}}}", rf"\mathrm{{{word}}}", rf"\text{{{rng.choice([w for w in WORDS if w != word])}}}"


def _response(said: str | None, rng: random.Random) -> str:
    lines = [
        rf"Let $x = {rng.randint(2, 99)}$ and note that $x^2 = {rng.randint(4, 9801)}$.",
        rf"We get \[ \frac{{x + {rng.randint(1, 9)}}}{{{rng.randint(2, 9)}}} = {rng.randint(1, 99)} \] after substitution.",
        "Adding both sides and simplifying gives the result.",
    ] * rng.randint(1, 4)
    body = "\n".join(lines)
    if said is None:
        return body + "\nI am not sure how to go on"
    return body + rng.choice(
        [rf"\nThe answer is $\boxed{{{said}}}$.", rf"\n\n\boxed{{{said}}}", rf"\nSo we have \boxed{{{said}}}."]
    )


def rows(problems: int, seed: int = 0, k: int = 8) -> list[tuple[str, str]]:
    """(text, gold answer) of k responses to each problem."""
    rng = random.Random(seed)
    made = []
    for _ in range(problems):
        gold, alike, wrong = _answer(rng.choices(KINDS, WEIGHTS)[0], rng)
        garbage = rng.choice([r"\frac{}{", "?? + !!", "I think so", r"\sqrt{}", "}{", "", "1 or 2 or maybe 3", "x = = 4"])
        skill = rng.random()
        for _ in range(k):
            said = rng.choices([gold, alike, wrong, garbage, None], [4 * skill, 2 * skill, 4 * (1 - skill), 0.5, 0.5])[0]
            made.append((_response(said, rng), gold))
    return made


def plain(row: tuple[str, str]) -> bool:
    """math-verify as its README has it, on one row."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    text, gold = row
    found = parse(text, parsing_timeout=None)
    return bool(verify(parse(rf"\boxed{{{gold}}}", parsing_timeout=None), found, timeout_seconds=None))


def measure(work: list[tuple[str, str]], workers: int, repeat: int) -> dict[str, Any]:
    """Seconds of both in turns, and the rows on which they differ."""
    context = multiprocessing.get_context("forkserver")
    items = [Item(str(i), text, gold, "math", "stop", "", None, "bench") for i, (text, gold) in enumerate(work)]
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    theirs: list[bool] = []
    mine: list[bool] = []
    with ProcessPoolExecutor(workers, mp_context=context) as peer:
        list(peer.map(plain, work[:8] * workers))
        for _ in range(repeat):
            began = time.perf_counter()
            theirs = list(peer.map(plain, work, chunksize=64))
            seconds["plain"].append(time.perf_counter() - began)
            with VerdictPool(
                {"math": MathScorer()}, workers=workers, timeout_s=10, memory_mb=2048
            ) as pool:  # fresh: nothing remembered
                began = time.perf_counter()
                mine = [verdict.correct for verdict in pool.score(items)]
                seconds["ours"].append(time.perf_counter() - began)
    differ = [work[i] for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b]
    ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
    return {
        "rows": len(work),
        "workers": workers,
        "correct": sum(theirs),
        "seconds": seconds,
        "ratio": ratio,
        "differ": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=2500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(rows(options.problems), options.workers, options.repeat)
    if options.json:
        print(json.dumps(found))
        return
    took = {name: statistics.median(each) for name, each in found["seconds"].items()}
    print(f"{found['rows']} rows, {found['workers']} processes, {found['correct']} correct")
    print(
        f"plain math-verify {took['plain']:.1f} s, dypo {took['ours']:.1f} s: {found['ratio']:.1f}x; {len(found['differ'])} verdicts differ"
    )
    for text, gold in found["differ"][:10]:
        print("  ", repr(text[-60:]), "against", repr(gold))


if __name__ == "__main__":
    main()
