"""Made-up answers of many kinds, and math-verify's own verdict on them: what the quick decisions are held against."""

import logging
import random
from functools import lru_cache

from pipeline.scorers import math_answer

WORDS = ("east", "west", "seat", "eats", "odd", "even", "monday", "red", "pie", "exp", "sin", "log", "max", "tan", "sqrt", "true",
         "false", "yes", "none", "six", "ten", "kilometers", "degrees", "cube", "units")  # fmt: skip


@lru_cache(maxsize=100_000)
def by_math_verify(text: str, answer: str) -> bool:
    """Whether math-verify, left alone, finds the gold answer in the text."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    try:
        return verify(math_answer._parsed_gold(answer), parse(text, parsing_timeout=0), timeout_seconds=None)
    finally:
        logging.disable(logging.NOTSET)


def number(r: random.Random) -> str:
    return r.choice(
        [
            str(r.randint(-30, 30)), f"{r.randint(-30, 30)}.{r.randint(0, 9)}", f"{r.randint(0, 30)}.{r.randint(0, 99):02d}0",
            f"{r.randint(1, 99)},{r.randint(0, 999):03d}", str(r.randint(0, 10**7)), f"0{r.randint(0, 9)}",
        ]
    )  # fmt: skip


def ratio(r: random.Random) -> str:
    a, b = r.randint(0, 12), r.randint(1, 12)
    spellings = [rf"\frac{{{a}}}{{{b}}}", rf"\frac{{-{a}}}{{{b}}}", rf"-\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"-{a}/{b}"]
    return r.choice([*spellings, rf"\dfrac{{{a}00}}{{{b}00}}"])


def root(r: random.Random) -> str:
    return rf"{r.choice(['', '-', '0', '2', '5', '-3'])}\sqrt{{{r.choice([0, 1, 2, 3, 4, 5, 8, 9, 12, 18, 20, 45, 50])}}}"


def small(r: random.Random) -> str:
    spellings = [str(r.randint(-4, 4)), "0.5", "-1.5", rf"\frac{{{r.randint(-3, 3)}}}{{{r.randint(1, 3)}}}"]
    return r.choice([*spellings, rf"{r.choice(['', '2', '-'])}\sqrt{{{r.choice([2, 3, 4, 8])}}}"])


def braces(r: random.Random) -> str:
    return r"\{" + ", ".join(small(r) for _ in range(r.randint(1, 3))) + r"\}"


def interval(r: random.Random) -> str:
    return r.choice(["(", "[", r"\left["]) + small(r) + r.choice([",", ", "]) + small(r) + r.choice([")", "]", r"\right)"])


def word(r: random.Random) -> str:
    return rf"\text{{{r.choice(WORDS)}}}"


PLAIN = [number, ratio, root, small, small, braces, braces, interval, interval, word]


def spaced(text: str, r: random.Random) -> str:
    """Now and then a space, or a command for one, after a character."""
    return "".join(ch + (r.choice([" ", r"\,", "\\ ", "  "]) if r.random() < 0.15 else "") for ch in text)


def term(r: random.Random) -> str:
    letter = r.choice("abcxyznkmrtuvw")
    shapes = [letter, f"{r.randint(2, 9)}{letter}", f"{letter}^{r.randint(2, 4)}", f"{r.randint(1, 99)}", f"{letter}{r.choice('xyz')}",
              f"-{letter}", f"{r.randint(2, 9)}{letter}^{{{r.randint(2, 12)}}}"]  # fmt: skip
    return r.choice(shapes)


def formula(r: random.Random) -> str:
    """A sum, product or quotient in a few letters."""
    gap = r.choice(["", " "])

    def several() -> str:
        return f"{gap}{r.choice('+-')}{gap}".join(term(r) for _ in range(r.randint(1, 3)))

    return r.choice([several(), several(), rf"\frac{{{several()}}}{{{several()}}}", rf"({several()}) \cdot {term(r)}",
                     rf"{r.randint(2, 9)}({several()})", rf"{r.randint(2, 9)} \times {r.randint(2, 9)}"])  # fmt: skip


def equation(r: random.Random) -> str:
    return formula(r) + r.choice(["=", " = ", "= "]) + r.choice([number, ratio, root, small, small])(r)


def odd(r: random.Random) -> str:
    """What is no plain answer: other functions, percent, units, pairs, prose."""
    n, m = r.randint(1, 9), r.randint(1, 9)
    return r.choice(
        [
            r"\pi", rf"{n}\pi", rf"\frac{{\pi}}{{{n}}}", rf"{n}\%", rf"{n}^{{{m}}}", rf"{n}!", rf"\binom{{{n + m}}}{{{n}}}", rf"{n}\text{{ cm}}",
            rf"{n}^\circ", rf"{n}+{m}i", rf"{n}\sqrt[3]{{{m}}}", rf"\sqrt{{{n}}}+\sqrt{{{m}}}", rf"\sin {n}", rf"e^{{{n}}}", rf"x={n}", rf"x={n},y={m}",
            rf"{n},{m}", rf"{n} \text{{ or }} {m}", rf"\pm {n}", rf"{n} \frac{{{m}}}{{9}}", "x = = 4", "I think so", "1 or 2 or maybe 3", "?? + !!", "",
            r"\sqrt{}", r"\frac{}{", "yes", "none of these", rf"x < {n}", rf"{n} \le x < {n + m}", r"\infty", r"\emptyset", rf"{n}:{m}", rf"\log {n}",
            rf"f({n})={m}", rf"S_{{{n}}}={m}", rf"a_{n}={m}", r"\frac{x}{y}", "ab", "e", "i", rf"{n}e{m}", rf"\${n}", rf"{n} \cdot 10^{m}", "true",
            rf"\begin{{pmatrix}}{n}\\{m}\end{{pmatrix}}", rf"(-\infty,{n})", rf"[{n},\infty)", rf"\{{{n}\}}\cup\{{{m}\}}", rf"({n},{m},{n})", rf"|{n}|", rf"{n}k+{m}",
        ]
    )  # fmt: skip


ENDS = [
    "",
    ".",
    " is the answer.",
    "\nDone.",
    " which we wanted",
    ", so we stop",
    "\n\nI am not sure",
    " and 5 more",
    "!",
    "?",
]
WRAPS = [
    r"\boxed{%s}",
    r"$\boxed{%s}$",
    "$%s$",
    r"\(%s\)",
    r"\[%s\]",
    "$$%s$$",
    "%s",
    " %s",
    r"\[ %s \]",
    r"\fbox{%s}",
    r"$x=\boxed{%s}$",
    "**%s**",
]
LEADS = ["", "So ", "The answer is ", "Answer: ", "The final answer is ", "Hence the value is: ", "answer = ", "we get "]


def text(r: random.Random, said: str) -> str:
    """A response that says it, in a box, in a formula or in plain words, after some working."""
    working = r.choice(
        [
            "",
            "",
            f"Let ${equation(r)}$. ",
            rf"We have \[{equation(r)}\] and thus" + "\n",
            rf"First \boxed{{{small(r)}}}. ",
            f"Then {small(r)}. ",
        ]
    )
    return working + r.choice(LEADS) + r.choice(WRAPS) % said + r.choice(ENDS)
