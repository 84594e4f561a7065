"""Compare two parsed answers for equivalence; SymPy and math-verify compare formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from math_verify import verify
from sympy import (
    And,
    Expr,
    Float,
    GreaterThan,
    Integral,
    LessThan,
    Limit,
    Product,
    Rational,
    StrictGreaterThan,
    StrictLessThan,
    Sum,
    nan,
    oo,
    zoo,
)  # fmt: skip

from aligner.reward.answer_forms import Answer, Choice, Clock, Equation, Formula, Items, Quantity, Ratio, Words
from aligner.reward.answer_reading import expression, solutions
from aligner.reward.magnitude import too_big
from aligner.reward.units import KNOWN, Unit

DECIMALS = 6
"""Decimal places to which numbers with a decimal point are compared, as in math-verify."""
SIGNIFICANT = 4
"""Minimum number of significant digits compared: 1e-12 is not 0."""
HALF_DAY = 43_200
POUNDS = {Unit((("mass", 1),), KNOWN["lb"][1]), Unit((("pound sterling", 1),), Fraction(1))}
PERCENT = Fraction(1, 100)


def equivalent(gold: Answer, given: Answer) -> bool:
    """Whether a response's answer is equivalent to the gold answer. The gold answer's type decides: a parenthesised list
    matches a bare gold list in any order, a bare list matches a gold tuple only in its order.

    Raises:
        Exception: whatever SymPy raises for formulas that it cannot compare.
    """
    if gold.source == given.source:
        return True
    if isinstance(gold, Equation) or isinstance(given, Equation):
        return _same_equation(gold, given)
    if isinstance(gold, Choice) or isinstance(given, Choice):
        return _same_choice(gold, given)
    if isinstance(gold, Words) or isinstance(given, Words):
        return _same_words(gold, given)
    if isinstance(gold, Clock | Ratio) or isinstance(given, Clock | Ratio):
        return _same_ratio(gold, given)
    if isinstance(gold, Quantity) and isinstance(given, Quantity):
        return _same_quantity(gold, given)
    if isinstance(gold, Items) and isinstance(given, Items):
        return _same_items(gold, given)
    for left, right in ((gold, given), (given, gold)):
        if isinstance(left, Items) and left.brackets == "{}" and len(left.items) == 1 and isinstance(right, Quantity):
            return equivalent(gold, left.items[0]) if left is given else equivalent(left.items[0], given)
        if isinstance(left, Items) and isinstance(right, Quantity):
            return False
    return _verified(_value(gold), _value(given))


def _value(form: Answer) -> Any:
    return form.value if isinstance(form, Formula) else expression(form.source)


def _same_equation(gold: Answer, given: Answer) -> bool:
    if isinstance(gold, Equation) and isinstance(given, Equation):
        if gold.closed or given.closed:
            return equivalent(gold.last if gold.closed else gold, given.last if given.closed else given)
        if gold.name is not None and gold.name == given.name:
            return equivalent(gold.last, given.last)
        return _verified(expression(gold.source), expression(given.source))
    if isinstance(gold, Equation):
        if gold.name is None and not gold.closed:
            return False  # a solution of an equation is not the equation
        return equivalent(gold.last, given)
    assert isinstance(given, Equation)
    return equivalent(gold, given.last)


def _same_choice(gold: Answer, given: Answer) -> bool:
    letters = [form.letter if isinstance(form, Choice) else None for form in (gold, given)]
    if None not in letters:
        return letters[0] == letters[1]
    choice, other = (gold, given) if isinstance(gold, Choice) else (given, gold)
    assert isinstance(choice, Choice)
    if isinstance(other, Words) and len(other.spelling) == 1:
        return choice.letter == other.spelling
    if choice.rest is None:
        return False
    return equivalent(choice.rest, given) if choice is gold else equivalent(gold, choice.rest)


def _same_words(gold: Answer, given: Answer) -> bool:
    if isinstance(gold, Words) and isinstance(given, Words):
        return gold.spelling == given.spelling
    words, other = (gold, given) if isinstance(gold, Words) else (given, gold)
    assert isinstance(words, Words)
    if isinstance(other, Items):
        parts = [item.spelling if isinstance(item, Words) else "" for item in other.items]
        return not other.brackets and all(len(part) == 1 for part in parts) and "".join(parts) == words.spelling
    if len(words.spelling) == 1 and other.source.casefold() == words.spelling:
        return True
    if words.spelling in EVERYTHING and isinstance(other, Formula | Items):
        return _verified(expression(r"\mathbb{R}"), expression(other.source))
    if len(words.source) > 4 or not isinstance(other, Quantity) or other.unit is not None:
        return False
    product = expression(words.source)  # letters may be variables if the other side is a formula
    return product is not None and _same_value(product, other.value, True)


EVERYTHING = ("allrealnumbers", "allreals", "realnumbers", "thesetofallrealnumbers", "thesetofrealnumbers")


def _same_ratio(gold: Answer, given: Answer) -> bool:
    clocks = [form if isinstance(form, Clock) else getattr(form, "clock", None) for form in (gold, given)]
    if clocks[0] and clocks[1]:
        return _same_clock(clocks[0], clocks[1])
    for left, right in ((gold, given), (given, gold)):
        if isinstance(left, Clock):  # "3 p.m." for 3: only the half of the day is missing
            return isinstance(right, Quantity) and right.unit is None and right.value == left.seconds / 3600
    if isinstance(gold, Ratio) and isinstance(given, Ratio):
        return not (_is_time(gold) or ":0" in given.source) and _in_proportion(gold.parts, given.parts)
    ratio, right = (gold, given) if isinstance(gold, Ratio) else (given, gold)
    assert isinstance(ratio, Ratio)
    if len(ratio.parts) != 2 or not isinstance(right, Quantity) or right.unit is not None or ratio.parts[1] == 0:
        return False
    return _same_value(ratio.parts[0] / ratio.parts[1], right.value, right.exact)


def _is_time(ratio: Ratio) -> bool:
    """Whether it is a time such as 10:30, which as a ratio would have been reduced."""
    return ratio.clock is not None and (":0" in ratio.source or math.gcd(*(int(part) for part in ratio.parts)) > 1)


def _in_proportion(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        _same_value(x * v, y * u, True) for (x, u), (y, v) in zip(pairwise(a), pairwise(b), strict=True)
    )


def _same_clock(a: Clock, b: Clock) -> bool:
    if a.half and b.half:
        return (a.seconds, a.half) == (b.seconds, b.half)
    if a.half is None and b.half is None:
        return a.seconds == b.seconds
    with_half, without_half = (a, b) if a.half else (b, a)
    return without_half.seconds in (with_half.seconds, with_half.seconds + HALF_DAY) and (
        with_half.half == "p" or without_half.seconds < HALF_DAY
    )


def _same_quantity(gold: Quantity, given: Quantity) -> bool:
    if gold.base or given.base:
        bases = {form.base for form in (gold, given) if form.base}
        return len(bases) == 1 and _digits(gold) == _digits(given)
    exact = gold.exact and given.exact
    if gold.percent != given.percent:  # 50% equals 0.5, and also 50 if the question asks for percent
        part, whole = (gold, given) if gold.percent else (given, gold)
        return any(_same_value(_times(part.value, factor), whole.value, exact) for factor in (Fraction(1), PERCENT))
    factors = _factors(gold.unit, given.unit)
    return factors is not None and _same_value(_times(gold.value, factors[0]), _times(given.value, factors[1]), exact)


def _times(value: Any, factor: Fraction) -> Any:
    if factor == 1 or isinstance(value, Fraction):
        return value if factor == 1 else value * factor
    return value * Rational(factor.numerator, factor.denominator)


def _digits(form: Quantity) -> str:
    return re.sub(r"_.*|[\s{}]", "", form.source).casefold()


def _factors(gold: Unit | None, given: Unit | None) -> tuple[Fraction, Fraction] | None:
    """Factors that convert the two values to a common unit; None: different dimensions. A missing unit is the other's."""
    if gold is None or given is None or {gold, given} == POUNDS:
        return Fraction(1), Fraction(1)
    return (gold.factor, given.factor) if gold.measure == given.measure else None


def _same_items(gold: Items, given: Items) -> bool:
    kinds = gold.brackets, given.brackets
    a, b = gold.items, given.items
    if "{}" in kinds and set(kinds) <= {"{}", ""}:
        a, b = _distinct(a), _distinct(b)
    elif "{}" in kinds:
        return False
    if len(a) != len(b):
        return False
    if not kinds[0] and kinds[1] in ("", "()") and _names(a) != _names(b):
        return all(map(equivalent, a, b))  # x = 2, y = 3 against 2, 3: in order
    if kinds[0] in ("", "{}"):
        return (kinds[1] not in ("[]", "(]", "[)") or len(b) > 2) and _same_in_any_order(a, b)
    if len(a) == 2 and kinds[0] != kinds[1] and (kinds[1] or kinds[0] != "()"):
        return all(map(equivalent, a, b)) and _ends_alike(gold, given)
    return all(map(equivalent, a, b))


def _names(items: Sequence[Answer]) -> bool:
    """Whether they are values of several variables; x_1 and x_2 count as one."""
    names = {item.name.split("_")[0] for item in items if isinstance(item, Equation) and item.name}
    return len(names) > 1


def _ends_alike(gold: Items, given: Items) -> bool:
    """Whether the brackets of two intervals differ only at infinite ends."""
    infinite = [isinstance(item, Quantity) and item.value in (oo, -oo) for item in gold.items]
    return bool(given.brackets) and all(
        gold_end == given_end or end
        for gold_end, given_end, end in zip(_ends(gold), _ends(given), infinite, strict=True)
    )


def _ends(form: Items) -> tuple[bool, bool]:
    return form.brackets[0] == "[", form.brackets[1] == "]"


def _distinct(items: Sequence[Answer]) -> tuple[Answer, ...]:
    distinct: list[Answer] = []
    for item in items:
        if not any(equivalent(item, other) for other in distinct):
            distinct.append(item)
    return tuple(distinct)


def _same_in_any_order(gold: Sequence[Answer], given: Sequence[Answer]) -> bool:
    rest = list(given)
    for item in gold:
        match = next((i for i, other in enumerate(rest) if equivalent(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_value(a: Any, b: Any, exact: bool) -> bool:
    """Numbers: exactly, or to `DECIMALS` if one is a decimal. Other expressions: by SymPy."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        # An integer is not a rounded value.
        return a == b if exact or 1 in (a.denominator, b.denominator) else _near(a, b)
    a, b = _sympy(a), _sympy(b)
    if nan in (a, b) or zoo in (a, b):
        return False
    if a in (oo, -oo) or b in (oo, -oo):
        return bool(a == b)
    if a == b:
        return True
    if too_big(a) or too_big(b):
        return False
    if a.free_symbols or b.free_symbols:
        return not _differ_somewhere(a, b) and _verified(a, b)
    left, right = _evaluated(a), _evaluated(b)
    if left is None or right is None:
        return _verified(a, b)
    (re_a, im_a), (re_b, im_b) = left, right
    if exact:
        close = max(abs(re_a - re_b), abs(im_a - im_b))
        size = max(map(abs, (re_a, im_a, re_b, im_b)))
        return close <= size * Fraction(1, 10**30)
    return _near(re_a, re_b) and _near(im_a, im_b)


def _sympy(value: Any) -> Any:
    return Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def _near(a: Fraction, b: Fraction) -> bool:
    if a == b:
        return True
    smallest = min((abs(x) for x in (a, b) if x), default=Fraction(1))
    decimals = max(DECIMALS, SIGNIFICANT - 1 - _exponent(smallest))
    return round(a * 10**decimals) == round(b * 10**decimals) or abs(a - b) < max(abs(a), abs(b)) * Fraction(1, 10**12)


def _exponent(x: Fraction) -> int:
    """The decimal exponent in scientific notation."""
    return math.floor(math.log10(x.numerator) - math.log10(x.denominator))


def _evaluated(value: Expr) -> tuple[Fraction, Fraction] | None:
    """(real, imaginary) part to 40 digits; None: SymPy cannot evaluate it."""
    if value.has(Sum, Product, Integral, Limit):
        return None
    try:
        real, imaginary = value.evalf(40, chop=False).as_real_imag()
        return Fraction(str(Float(real, 40))), Fraction(str(Float(imaginary, 40)))
    except (TypeError, ValueError, AttributeError):
        return None


def _differ_somewhere(a: Expr, b: Expr) -> bool:
    """Whether two expressions differ at a test point; much cheaper than simplifying their difference."""
    if a.has(Float, Sum, Product, Integral, Limit) or b.has(Float, Sum, Product, Integral, Limit):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {symbol: Rational(137 + 211 * i, 100 + 3 * i) for i, symbol in enumerate(symbols)}
    try:
        values = [complex(value.subs(point).evalf(20)) for value in (a, b)]
    except Exception:  # no numeric value at the point: inconclusive
        return False
    if not all(math.isfinite(value.real) and math.isfinite(value.imag) for value in values):
        return False
    return abs(values[0] - values[1]) > 1e-9 * max(1.0, *map(abs, values))


def _verified(gold: Any, given: Any) -> bool:
    if gold is None or given is None or too_big(gold) or too_big(given):
        return False
    # An inequality is equivalent to its interval, on either side.
    if verify(gold, given, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True):
        return True
    if isinstance(gold, INEQUALITIES) and isinstance(given, INEQUALITIES) and gold.free_symbols == given.free_symbols:
        sets = solutions(gold), solutions(given)
        return sets[0] is not None and bool(sets[0] == sets[1])
    return False


INEQUALITIES = (StrictLessThan, LessThan, StrictGreaterThan, GreaterThan, And)
