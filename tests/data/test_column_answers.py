"""Right and wrong answers to additions, worked by hand."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.column_answers import column_answer, direct_answer, malformed, wrong_columns, wrong_number

TERM = st.integers(100, 999)
CHANCE = st.integers(0, 2**32).map(random.Random)


def test_answers_worked_by_hand() -> None:
    assert direct_answer(137, 485) == "#622"
    assert column_answer(137, 485) == "7+5+0=12 3+8+1=12 1+4+1=06#622"
    assert column_answer(999, 999) == "9+9+0=18 9+9+1=19 9+9+1=19#1998"
    assert column_answer(100, 200) == "0+0+0=00 0+0+0=00 1+2+0=03#300"


def test_slips_are_carried_on() -> None:
    assert column_answer(137, 485, {1: -2}) == "7+5+0=12 3+8+1=10 1+4+1=06#602"
    assert column_answer(137, 485, {0: -3}) == "7+5+0=09 3+8+0=11 1+4+1=06#619"
    assert column_answer(137, 485, {2: 9}) == "7+5+0=12 3+8+1=12 1+4+1=15#1522"
    assert column_answer(137, 485, {0: -3, 2: -6}) == "7+5+0=09 3+8+0=11 1+4+1=00#19"
    with pytest.raises(AssertionError, match="column 0 of 137\\+485 would be 20"):
        column_answer(137, 485, {0: 8})


@given(TERM, TERM, st.integers(1, 4), CHANCE)
def test_wrong_columns_follow_their_mistakes(left: int, right: int, digits: int, chance: random.Random) -> None:
    answer = wrong_columns(left, right, digits, chance)
    columns = re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", answer)
    assert [(int(a), int(b)) for a, b, _, _ in columns] == [(left // 10**i % 10, right // 10**i % 10) for i in range(3)]
    assert [c for _, _, c, _ in columns] == ["0", columns[0][3][0], columns[1][3][0]]
    mistaken = sum(int(a) + int(b) + int(c) != int(total) for a, b, c, total in columns)
    assert mistaken == min(digits, 3)
    said = int(answer.rpartition("#")[2])
    assert said == int(columns[2][3] + columns[1][3][1] + columns[0][3][1])
    assert said != left + right


@given(TERM, TERM, st.integers(1, 5), CHANCE)
def test_a_wrong_number_differs_in_that_many_digits(left: int, right: int, digits: int, chance: random.Random) -> None:
    answer = column_answer(left, right)
    wrong = wrong_number(answer, digits, chance)
    work, _, number = wrong.rpartition("#")
    assert work == answer.rpartition("#")[0]
    assert number[0] != "0"
    differing = sum(a != b for a, b in zip(number, str(left + right), strict=True))
    assert differing == min(digits, len(str(left + right)))


def test_a_malformed_answer_gives_no_number() -> None:
    found = {malformed("1+2+0=03#3", random.Random(seed)) for seed in range(20)}
    assert found == {"1+2+0=033", "1+2+0=03#"}
    assert {malformed("#3", random.Random(seed)) for seed in range(20)} == {"3", "#"}
