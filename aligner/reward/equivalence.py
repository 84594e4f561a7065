"""Whether two answers that were read say the same; SymPy and math-verify compare the formulas in them."""

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

from aligner.reward.answer_forms import Choice, Clock, Equation, Formula, Items, MessageLayout, Quantity, Ratio, Words
from aligner.reward.answer_reading import expression, solutions
from aligner.reward.magnitude import too_big
from aligner.reward.units import KNOWN, Unit

DECIMALS = 6
"""To which numbers with a decimal point are compared, as math-verify does."""
SIGNIFICANT = 4
"""Digits that count in any case: 1e-12 is not 0."""
HALF_DAY = 43_200
POUNDS = {Unit((("mass", 1),), KNOWN["lb"][1]), Unit((("pound sterling", 1),), Fraction(1))}
PERCENT = Fraction(1, 100)


def same(gold: MessageLayout, given: MessageLayout) -> bool:
    """Whether a response's answer says what the gold answer says; the gold one's form decides where the two differ:
    a list in parentheses may stand for a bare one in any order, a bare one for a tuple only in its order.

    Raises:
        Exception: whatever SymPy raises at formulas that it cannot compare.
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
    for one, other in ((gold, given), (given, gold)):
        if isinstance(one, Items) and one.brackets == "{}" and len(one.items) == 1 and isinstance(other, Quantity):
            return same(gold, one.items[0]) if one is given else same(one.items[0], given)
        if isinstance(one, Items) and isinstance(other, Quantity):
            return False
    return _verified(_value(gold), _value(given))


def _value(form: MessageLayout) -> Any:
    return form.value if isinstance(form, Formula) else expression(form.source)


def _same_equation(gold: MessageLayout, given: MessageLayout) -> bool:
    if isinstance(gold, Equation) and isinstance(given, Equation):
        if gold.closed or given.closed:
            return same(gold.last if gold.closed else gold, given.last if given.closed else given)
        if gold.name is not None and gold.name == given.name:
            return same(gold.last, given.last)
        return _verified(expression(gold.source), expression(given.source))
    if isinstance(gold, Equation):
        if gold.name is None and not gold.closed:
            return False  # what solves an equation is not the equation
        return same(gold.last, given)
    assert isinstance(given, Equation)
    return same(gold, given.last)


def _same_choice(gold: MessageLayout, given: MessageLayout) -> bool:
    letters = [form.letter if isinstance(form, Choice) else None for form in (gold, given)]
    if None not in letters:
        return letters[0] == letters[1]
    choice, other = (gold, given) if isinstance(gold, Choice) else (given, gold)
    assert isinstance(choice, Choice)
    if isinstance(other, Words) and len(other.spelling) == 1:
        return choice.letter == other.spelling
    if choice.rest is None:
        return False
    return same(choice.rest, given) if choice is gold else same(gold, choice.rest)


def _same_words(gold: MessageLayout, given: MessageLayout) -> bool:
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
    product = expression(words.source)  # letters may be variables where the other side is a formula
    return product is not None and _same_value(product, other.value, True)


EVERYTHING = ("allrealnumbers", "allreals", "realnumbers", "thesetofallrealnumbers", "thesetofrealnumbers")


def _same_ratio(gold: MessageLayout, given: MessageLayout) -> bool:
    clocks = [form if isinstance(form, Clock) else getattr(form, "clock", None) for form in (gold, given)]
    if clocks[0] and clocks[1]:
        return _same_clock(clocks[0], clocks[1])
    for one, other in ((gold, given), (given, gold)):
        if isinstance(one, Clock):  # "3 p.m." for 3, where only the half of the day is left out
            return isinstance(other, Quantity) and other.unit is None and other.value == one.seconds / 3600
    if isinstance(gold, Ratio) and isinstance(given, Ratio):
        return not (_is_time(gold) or ":0" in given.source) and _in_proportion(gold.parts, given.parts)
    ratio, other = (gold, given) if isinstance(gold, Ratio) else (given, gold)
    assert isinstance(ratio, Ratio)
    if len(ratio.parts) != 2 or not isinstance(other, Quantity) or other.unit is not None or ratio.parts[1] == 0:
        return False
    return _same_value(ratio.parts[0] / ratio.parts[1], other.value, other.exact)


def _is_time(ratio: Ratio) -> bool:
    """10:30 is a time: as a ratio it would have been reduced."""
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
    known, open_ = (a, b) if a.half else (b, a)
    return open_.seconds in (known.seconds, known.seconds + HALF_DAY) and (
        known.half == "p" or open_.seconds < HALF_DAY
    )


def _same_quantity(gold: Quantity, given: Quantity) -> bool:
    if gold.base or given.base:
        bases = {form.base for form in (gold, given) if form.base}
        return len(bases) == 1 and _digits(gold) == _digits(given)
    exact = gold.exact and given.exact
    if gold.percent != given.percent:  # 50% is 0.5, and what is asked for in percent is 50
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
    """What to multiply the two values by; None: they do not measure the same. A unit that one leaves out is the other's."""
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
        return all(map(same, a, b))  # x = 2, y = 3: whichever has no names has their order
    if kinds[0] in ("", "{}"):
        return (kinds[1] not in ("[]", "(]", "[)") or len(b) > 2) and _same_in_any_order(a, b)
    if len(a) == 2 and kinds[0] != kinds[1] and (kinds[1] or kinds[0] != "()"):
        return all(map(same, a, b)) and _ends_alike(gold, given)
    return all(map(same, a, b))


def _names(items: Sequence[MessageLayout]) -> bool:
    """Whether they are the values of several variables; x_1 and x_2 are values of one."""
    names = {item.name.split("_")[0] for item in items if isinstance(item, Equation) and item.name}
    return len(names) > 1


def _ends_alike(gold: Items, given: Items) -> bool:
    """Intervals whose brackets differ only at infinity."""
    infinite = [isinstance(item, Quantity) and item.value in (oo, -oo) for item in gold.items]
    return bool(given.brackets) and all(
        one == other or end for one, other, end in zip(_ends(gold), _ends(given), infinite, strict=True)
    )


def _ends(form: Items) -> tuple[bool, bool]:
    return form.brackets[0] == "[", form.brackets[1] == "]"


def _distinct(items: Sequence[MessageLayout]) -> tuple[MessageLayout, ...]:
    kept: list[MessageLayout] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


def _same_in_any_order(gold: Sequence[MessageLayout], given: Sequence[MessageLayout]) -> bool:
    rest = list(given)
    for item in gold:
        found = next((i for i, other in enumerate(rest) if same(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _same_value(a: Any, b: Any, exact: bool) -> bool:
    """Numbers: exactly, or to `DECIMALS` where one is a decimal. Other expressions: by SymPy."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        # A whole number is not a rounded one.
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
    one, other = _evaluated(a), _evaluated(b)
    if one is None or other is None:
        return _verified(a, b)
    (re_a, im_a), (re_b, im_b) = one, other
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
    """Of ten, in scientific notation."""
    return math.floor(math.log10(x.numerator) - math.log10(x.denominator))


def _evaluated(value: Expr) -> tuple[Fraction, Fraction] | None:
    """(real, imaginary) part to 40 digits; None: SymPy has no number for it."""
    if value.has(Sum, Product, Integral, Limit):
        return None
    try:
        real, imaginary = value.evalf(40, chop=False).as_real_imag()
        return Fraction(str(Float(real, 40))), Fraction(str(Float(imaginary, 40)))
    except (TypeError, ValueError, AttributeError):
        return None


def _differ_somewhere(a: Expr, b: Expr) -> bool:
    """Whether two expressions have different values at a point; far cheaper than to simplify their difference."""
    if a.has(Float, Sum, Product, Integral, Limit) or b.has(Float, Sum, Product, Integral, Limit):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {symbol: Rational(137 + 211 * i, 100 + 3 * i) for i, symbol in enumerate(symbols)}
    try:
        values = [complex(value.subs(point).evalf(20)) for value in (a, b)]
    except Exception:  # not numbers there: nothing is shown
        return False
    if not all(math.isfinite(value.real) and math.isfinite(value.imag) for value in values):
        return False
    return abs(values[0] - values[1]) > 1e-9 * max(1.0, *map(abs, values))


def _verified(gold: Any, given: Any) -> bool:
    if gold is None or given is None or too_big(gold) or too_big(given):
        return False
    # An inequality says what its interval says, on either side.
    if verify(gold, given, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True):
        return True
    if isinstance(gold, INEQUALITIES) and isinstance(given, INEQUALITIES) and gold.free_symbols == given.free_symbols:
        sets = solutions(gold), solutions(given)
        return sets[0] is not None and bool(sets[0] == sets[1])
    return False


INEQUALITIES = (StrictLessThan, LessThan, StrictGreaterThan, GreaterThan, And)
