"""Writes the tiny world's large eval sets, data/tiny/eval1000_{id,shift,sub}.jsonl: 1,000 problems each.

    python data/make_tiny_suites.py              again, the same bytes (ten seconds)
    python data/make_tiny_suites.py --out DIR    under DIR, to compare with what is committed

One idea: an eval problem is one that the embedded policy has never seen, in pretraining, training or the small eval sets. So
pretraining's stream of problems is drawn again (make_tiny_policy.batches), and what it holds is drawn anew here. That leaves
hardly any two-term problems: pretraining saw all but 25 of the 9,801 two-term sums that training and the small eval sets leave over.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import make_tiny_policy as policy

from pipeline import tiny

KINDS = ("id", "shift", "sub")


def known() -> set[str]:
    """Every problem of data/tiny, and every one that the embedded policy was pretrained on."""
    held_out = {problem for rows in policy.make_problems().values() for problem in rows}
    seen: set[str] = set()
    for _, batch in zip(range(policy.STEPS), policy.batches(held_out), strict=False):
        seen |= {policy.decode(tokens[1 : length - 1]) for length, tokens in batch}
    assert not seen & held_out
    return seen | held_out


def make() -> dict[str, list[str]]:
    """The problems of each file, none of them twice."""
    taken = known()
    return {f"eval1000_{kind}": tiny.suite(kind, taken) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description="make the tiny world's large eval sets")
    parser.add_argument("--out", type=Path, default=policy.HERE, help="folder to write tiny/ into")
    out = parser.parse_args().out
    problems = make()
    policy.write_problems(problems, out / "tiny")
    for name, rows in problems.items():
        by_terms = sorted(Counter(len(tiny.terms(problem)) for problem in rows).items())
        print(f"{name}: {len(rows)} problems; terms: {json.dumps(dict(by_terms))}")


if __name__ == "__main__":
    main()
