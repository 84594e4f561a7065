"""Answers of mathematics that are equal, and that are not, decided by hand."""

from __future__ import annotations

import logging
import math
import signal

import pytest

from aligner.reward.mathematics import final_answer, math_equivalent
from aligner.reward.pool import RulePool, Status

EQUAL = [
    (r"so \boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    ("He has 42 apples.\n#### 42", "6*7 = 42\n#### 42"),
    ("The answer is 42.", "42"),
    ("#### 1,234", "1234"),
    ("That makes $1,234.00", 1234),
    ("- 3", "-3"),
    ("so -3", "- 3"),
    ("1e3", "1000"),
    ("0.333333", "1/3"),
    (r"\boxed{x+1}", "1+x"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{\frac{\pi}{3}}", r"\pi/3"),
    (r"\boxed{(1,2)}", "(1,2)"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"$$\frac{3}{4}$$", ".75"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{18 \text{ dollars}}", "18"),
    ("#### 18 dollars", "18"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"first \boxed{1}, then \boxed{2}", "2"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{yes}", "Yes"),
    ("5 - 3 = 2", "2"),
]
DIFFERENT = [
    ("The answer is 41.", "42"),
    ("I think 3", "-3"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{A}", "B"),
    (r"\boxed{0.33}", "1/3"),
    (r"first \boxed{1}, then \boxed{2}", "1"),
    (r"42 \boxed{}", "42"),
    (r"42 \boxed{41}", "42"),
    ("42\n#### 41", "42"),
    ("no idea", "42"),
    ("", "42"),
]


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_equal(response: str, answer: object) -> None:
    assert math_equivalent("p", response, answer=answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_different(response: str, answer: object) -> None:
    assert math_equivalent("p", response, answer=answer) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [(r"\boxed{a{b}c} \boxed{d", "a{b}c"), ("x #### 1 #### 2\nend", "2"), (r"\boxed{3} #### 4", "3"), ("5", None), ("####", None)],
)  # fmt: skip
def test_where_the_final_answer_stands(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_it_says_nothing_and_sets_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """The library's own time limits would replace an alarm of the caller's."""
    before = signal.getsignal(signal.SIGALRM)
    with caplog.at_level(logging.DEBUG):
        math_equivalent("p", r"\boxed{\frac{3}{4}}", answer="0.75")
    assert signal.getsignal(signal.SIGALRM) is before
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_tower_of_powers_costs_its_own_row() -> None:
    """SymPy cannot be interrupted inside it; the worker is killed and the next row is scored."""
    items = [
        {"prompt": "p", "response": rf"\boxed{{{text}}}", "fields": {"answer": "6"}}
        for text in ("6", "9^{9^{9^{9}}}", r"\frac{12}{2}")
    ]
    with RulePool("aligner.reward.mathematics.math_equivalent", workers=1, timeout_s=3.0) as pool:
        scores = pool.score(items)
    assert [score.status for score in scores[::2]] == [Status.OK, Status.OK]
    assert [score.value for score in scores[::2]] == [1.0, 1.0]
    assert scores[1].value == 0.0 or (scores[1].status is not Status.OK and math.isnan(scores[1].value))
