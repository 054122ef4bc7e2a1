"""Whether two answers certainly differ: their values at one point, where math-verify would simplify their difference.

math-verify finds two expressions equal if their difference simplifies to zero, or rounds to it; simplifying is what makes wrong
answers slow. Sums, products and powers that are equal are equal at every point, so a clear difference at one (each letter has a
number of its own) settles it. A small difference, another function, a value that floats cannot hold or whose rounding errors add
up: nothing is settled.
"""

import math
import zlib
from collections.abc import Iterable
from typing import Any

NEAR = 1e-5  # math-verify rounds to six places
EPSILON = 1e-15
DEPTH = 40  # of nested operations; past it math-verify has to say


def differs(gold: Iterable[float], found: Any) -> bool:
    """Whether an element of what was found is certainly none of gold's values."""
    from sympy import Eq, FiniteSet

    golds = list(gold)
    if isinstance(found, Eq):
        found = found.rhs  # as math-verify compares an equation with what is none
    for element in found.args if isinstance(found, FiniteSet) else [found]:
        at = value(element)
        if at is not None and all(abs(at - each) > NEAR * max(1.0, abs(at), abs(each)) for each in golds):
            return True
    return False


def value(expr: Any) -> complex | None:
    """An expression's value where each letter has a number of its own; None if it is not sums, products and powers."""
    try:
        at, error = _value(expr, DEPTH)
    except (ArithmeticError, ValueError, TypeError, AttributeError):
        return None
    return at if math.isfinite(abs(at)) and error < NEAR / 10 * max(1.0, abs(at)) else None


def _value(expr: Any, depth: int) -> tuple[complex, float]:
    """The value and how far off rounding may have put it. ValueError where there is none to be had."""
    if expr.is_Symbol:
        if not expr.name.isalpha():
            raise ValueError  # \mathbf{5} is a letter of the name 5, which math-verify finds equal to the number
        return 1.0 + zlib.crc32(expr.name.encode()) / 2**32, 0.0
    if expr.is_Number or expr.is_NumberSymbol:
        number = float(expr)
        return number, abs(number) * EPSILON
    if str(expr) == "I":
        return 1j, 0.0
    if not depth or not (expr.is_Add or expr.is_Mul or expr.is_Pow):
        raise ValueError
    parts = [_value(each, depth - 1) for each in expr.args]
    values = [each for each, _ in parts]
    if expr.is_Add:
        return sum(values), sum(error for _, error in parts) + EPSILON * sum(map(abs, values))
    if expr.is_Mul:
        at = math.prod(values)
        return at, abs(at) * sum(EPSILON + error / abs(each) for each, error in parts)
    (base, error), (exponent, inexact) = parts
    if exponent.imag or abs(exponent) > 99 or inexact > 1e-12 or (exponent.real % 1 and (base.imag or base.real <= 0)):
        raise ValueError  # of several roots, which one?
    at = base**exponent.real
    return at, abs(at) * (EPSILON + (abs(exponent) + 1) * error / abs(base) + inexact * abs(math.log(abs(base))))
