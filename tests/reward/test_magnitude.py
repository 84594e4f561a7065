"""Numbers that nothing should try to compute."""

import pytest
from sympy import E, Float, I, Integer, Matrix, Pow, Rational, Symbol, exp, factorial, gamma, oo, pi

from aligner.reward.magnitude import too_big

x = Symbol("x")


def power(base: object, exponent: object) -> Pow:
    return Pow(base, exponent, evaluate=False)


@pytest.mark.parametrize(
    "value",
    [
        power(10, power(10, 10)),
        power(2, power(2, 100)),
        power(2, -power(10, 10)),
        power(Float("0.5"), power(10, 10)),
        power(x + 1, 100_000),
        factorial(10**9, evaluate=False),
        factorial(factorial(20), evaluate=False),
        gamma(Integer(10) ** 10, evaluate=False),
        exp(exp(exp(10, evaluate=False), evaluate=False), evaluate=False),
        Matrix([[1, power(10, power(10, 10))]]),
        1 + power(10, power(10, 10)),
    ],
)
def test_too_big(value: object) -> None:
    assert too_big(value)


@pytest.mark.parametrize(
    "value",
    [
        Integer(10) ** 300,
        power(2, 2010),
        power(5, 12345),
        power(x, 10**10),
        power(x + 1, 7),
        power(-1, 10**20),
        power(1, 10**20),
        factorial(100),
        Rational(1, 10**12),
        Float("1e-300"),
        2 * pi + E,
        x**2 + 3 * x,
        oo,
        I,
        Matrix([[1, 2]]),
    ],
)
def test_not_too_big(value: object) -> None:
    assert not too_big(value)
