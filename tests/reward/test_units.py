"""Words behind a number: which are units, and of what."""

from fractions import Fraction

import pytest

from aligner.reward.units import Unit, read_unit


def unit(factor: str, *measure: tuple[str, int]) -> Unit:
    return Unit(measure, Fraction(factor))


@pytest.mark.parametrize(
    ("text", "found", "scale"),
    [
        ("cm", unit("1/100", ("length", 1)), 1),
        ("square centimeters", unit("1/10000", ("length", 2)), 1),
        ("cm^2", unit("1/10000", ("length", 2)), 1),
        ("cubic feet", unit("28316846592/1000000000000", ("length", 3)), 1),
        ("inches squared", unit("64516/100000000", ("length", 2)), 1),
        ("miles per hour", unit("1397/3125", ("length", 1), ("time", -1)), 1),
        ("mph", unit("1397/3125", ("length", 1), ("time", -1)), 1),
        ("m/s^2", unit("1", ("length", 1), ("time", -2)), 1),
        ("million dollars", unit("1", ("dollar", 1)), 10**6),
        ("hundred thousand", None, 10**5),
        ("cents", unit("1/100", ("dollar", 1)), 1),
        ("apples", unit("1", ("apple", 1)), 1),
        ("cookies per box", unit("1", ("box", -1), ("cooky", 1)), 1),
        ("°C", unit("1", ("celsius", 1)), 1),
        ("degrees Celsius", unit("1", ("celsius", 1)), 1),
        ("degrees", unit("1", ("angle", 1)), 1),
    ],
)
def test_units(text: str, found: Unit | None, scale: int) -> None:
    assert read_unit(text) == (found, scale)


@pytest.mark.parametrize("text", ["x", "xy", "ab", "or more", "to 4", "and", "mod 7", "is the answer", "a b c", "!"])
def test_what_is_no_unit(text: str) -> None:
    assert read_unit(text) is None


def test_a_letter_is_a_unit_only_behind_a_blank() -> None:
    assert read_unit("m") == (unit("1", ("length", 1)), 1)
    assert read_unit("m", spoken=False) is None
    assert read_unit("eV", in_text=True) == (unit("1", ("electronvolt", 1)), 1)
    assert read_unit("MeV") != read_unit("eV")
