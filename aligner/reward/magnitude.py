"""Estimate how large a number would become before SymPy evaluates it."""

from __future__ import annotations

import math
from typing import Any

import mpmath
from sympy import Add, Basic, Float, MatrixBase, Mul, Pow, Product, Rational, Sum, Symbol, exp, gamma
from sympy.functions.combinatorial.factorials import CombinatorialFunction

MOST_DIGITS = 20_000
"""Largest number of decimal digits that is evaluated."""
MOST_POWER = 200
"""Largest exponent of a sum that is expanded."""
MOST_TERMS = 10_000


def too_big(value: Any) -> bool:
    """Whether evaluating it would take too much time or memory: 10^10^10, 100000000!, (x+1)^100000."""
    try:
        return _log10(value) > MOST_DIGITS
    except OverflowError:
        return True


def _log10(value: Any) -> float:
    """Upper bound of the decimal digits that appear in its evaluation. Raises OverflowError if it is too large."""
    if isinstance(value, MatrixBase):
        return max(map(_log10, value.flat()), default=0.0)
    if not isinstance(value, Basic) or isinstance(value, Symbol):
        return 0.0
    if isinstance(value, Rational):
        return math.log10(max(abs(value.p), value.q))
    if isinstance(value, Float):
        return abs(float(mpmath.log10(abs(value._to_mpmath(15))))) if value else 0.0
    inner = [_log10(arg) for arg in value.args]
    if isinstance(value, Pow):
        return _log10_of_power(value, inner)
    if isinstance(value, exp):
        return float(10 ** inner[0]) if not value.free_symbols else max(inner)
    if isinstance(value, CombinatorialFunction | gamma | Sum | Product) and max(inner) > math.log10(MOST_TERMS):
        raise OverflowError
    if isinstance(value, CombinatorialFunction | gamma):
        return float(10 ** max(inner) * 4)
    return sum(inner) if isinstance(value, Mul) else max(inner, default=0.0) + (1.0 if isinstance(value, Add) else 0.0)


def _log10_of_power(value: Pow, inner: list[float]) -> float:
    base, exponent = value.args
    size = 10 ** inner[1]
    if base.free_symbols and size > MOST_POWER and not isinstance(base, Symbol):
        raise OverflowError
    if base.free_symbols or exponent.free_symbols:
        return max(inner)
    return 0.0 if base in (0, 1, -1) else float(size * max(inner[0], 0.3))
