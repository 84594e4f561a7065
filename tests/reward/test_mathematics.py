"""Answers of mathematics that are equal, and that are not: decided by hand, and beside math-verify's own verdicts."""

from __future__ import annotations

import logging
import signal
import threading
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from aligner.reward.mathematics import final_answer, math_equivalent
from aligner.reward.pool import RulePool, Status
from aligner.reward.worker import rule_problem, score_row
from tests.reward.math_pairs import PAIRS, WHY

RULE = "aligner.reward.mathematics.math_equivalent"
TABLE = pytest.mark.parametrize(("gold", "response", "verdict", "why"), PAIRS, ids=lambda value: str(value)[:40])


def boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def judged(answer: Any, response: str, **settings: Any) -> float:
    return math_equivalent("p", response, answer=answer, **settings)


def of_table(gold: str, response: str) -> tuple[str, str]:
    return gold.removeprefix(">"), response[1:] if response.startswith(">") else boxed(response)


def test_the_table_is_of_many_pairs_that_all_differ() -> None:
    assert len({pair[:2] for pair in PAIRS}) == len(PAIRS) >= 500
    assert {why for *_, why in PAIRS if why} == set(WHY)


@TABLE
def test_table(gold: str, response: str, verdict: int, why: str) -> None:
    answer, text = of_table(gold, response)
    assert judged(answer, text) == verdict


@TABLE
def test_math_verify_alone(gold: str, response: str, verdict: int, why: str) -> None:
    """As its documentation uses it. Where it differs, the table says why; a change of the library is seen here."""
    golds = parse(gold[1:] if gold.startswith(">") else gold if gold[0] == gold[-1] == "$" else f"${gold}$")
    values = parse(response[1:] if response.startswith(">") else f"${boxed(response)}$")
    assert verify(golds, values) == (bool(verdict) if not why else not verdict)


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
    assert judged(answer, response) == 1.0


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_different(response: str, answer: object) -> None:
    assert judged(answer, response) == 0.0


@pytest.mark.parametrize(
    ("answer", "given", "reward"),
    [
        (["3", "5"], "3", 1.0),
        (["3", "5"], "5", 1.0),
        (["3", "5"], "4", 0.0),
        (["3", "5"], "3, 5", 0.0),
        (["2,3"], "3, 2", 1.0),
        (["north"], "North", 1.0),
        (["1/2", "0.5"], r"\frac{2}{4}", 1.0),
        (["$2$"], "2", 1.0),
        ([2, 3.5], "3.5", 1.0),
        (("B", "(B) 12"), "12", 1.0),
        (42, "42.0", 1.0),
        (1e-7, "0.0000001", 1.0),
        (0.25, r"\frac14", 1.0),
        (True, "true", 1.0),
    ],
)
def test_an_answer_may_be_a_number_or_a_list_of_accepted_ones(answer: object, given: str, reward: float) -> None:
    assert judged(answer, boxed(given)) == reward


UNREADABLE = [
    None, {"value": 3}, [], [None], [["3"]], ["3", {}], "", "  ", [""], float("nan"), float("inf"), b"3", "$$", r"\boxed{}", "???",
    r"\frac{1}{", "3 4", r"\frac{1}{0}", r"\begin{cases} 1 \\ 2", "word " * 40, "9" * 20_000, "(" * 2000 + "6" + ")" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("answer", UNREADABLE, ids=lambda answer: repr(answer)[:30])
@pytest.mark.parametrize("response", [r"\boxed{3}", "no idea", r"\boxed{None}", ""])
def test_an_answer_that_cannot_be_read_is_the_rows_fault_whatever_is_said(answer: object, response: str) -> None:
    with pytest.raises(ValueError, match=r"^answer="):
        judged(answer, response)
    score = score_row(RULE, {}, "p", response, {"answer": answer})
    assert score.status is Status.FAILED
    assert "answer=" in score.detail


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a{b}c} \boxed{d", "a{b}c"),
        ("x #### 1 #### 2\nend", "2"),
        (r"\boxed{3} #### 4", "3"),
        ("5", None),
        ("####", None),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{\left[0, 1\}}", r"\left[0, 1\}"),
        (r"\boxed {7}", "7"),
        (r"$\boxed7$", "7"),
        (r"\boxed\frac{1}{2} end", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"\boxed{1}. Now \boxed{2}", "2"),
        (r"\boxed{1}$, $\boxed{1}", "1"),
        ("#### Step 2\nthen", None),
        ("#### Conclusion\nIt is 5.", None),
        ("#### 3. Add\nIt is 5.", None),
        ("##### 5\n", None),
        ("### 5\n", None),
        ("#### 5\n#### Check\nfine", "5"),
        ("#### $5\nmore", "$5"),
        ("#### north\n\n", "north"),
        ("<answer>\n7 </answer> 8", "7"),
        (r"<answer>so \boxed{7}</answer>", "7"),
        ("<answer>7", None),
    ],
)
def test_where_the_final_answer_stands(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("response", "settings", "reward"),
    [
        ("The answer is 12.", {}, 1.0),
        ("The answer is 12.", {"boxed_only": True}, 0.0),
        ("#### 12", {"boxed_only": True}, 0.0),
        (r"\boxed{12}", {"boxed_only": True}, 1.0),
        (r"<answer>\boxed{12}</answer>", {"boxed_only": True}, 1.0),
        (r"<think>\boxed{12}</think> \boxed{13}", {}, 0.0),
        (r"<think>\boxed{12}", {}, 0.0),
        (r"\boxed{12}</think>", {}, 0.0),
        (r"a</think> b \boxed{12}", {}, 1.0),
        (r"<think>\boxed{12}", {"reasoning_end": ""}, 1.0),
        (r"<reason>\boxed{13}</reason> \boxed{12}", {"reasoning_end": "</reason>"}, 1.0),
        (r"<reason>\boxed{12}", {"reasoning_end": "</reason>"}, 0.0),
    ],
)
def test_settings(response: str, settings: dict[str, Any], reward: float) -> None:
    assert judged("12", response, **settings) == reward


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"boxed_only": 1}, "reward.kwargs.boxed_only=1 must be true or false."),
        ({"reasoning_end": None}, "reward.kwargs.reasoning_end=None must be text, such as '</think>'; '' for none."),
        ({"boxed_only": True, "reasoning_end": "</think>"}, None),
    ],
)
def test_settings_are_checked_before_the_job(kwargs: dict[str, Any], said: str | None) -> None:
    assert rule_problem(RULE, kwargs, 5.0, "reward") == said


def test_a_rows_own_fields_do_not_set_them() -> None:
    assert score_row(RULE, {}, "p", "The answer is 12.", {"answer": "12", "boxed_only": True}).value == 1.0


WRITTEN = [
    "{}",
    "${}$",
    r"\boxed{{{}}}",
    r"\text{{{}}}",
    "{}.",
    "{}.0",
    "{}.000",
    " {} ",
    r"\mathbf{{{}}}",
    "x = {}",
    "**{}**",
]
WRITTEN += [
    "{} apples",
    r"{} \text{{ cm}}",
    r"\frac{{{}}}{{1}}",
    "({})",
    r"\left({}\right)",
    r"{}\%",
    "{{{}}}",
    r"\$ {}",
    r"\,{}\;",
]


@given(number=st.integers(-(10**15), 10**15), form=st.sampled_from(WRITTEN))
@settings(max_examples=150, deadline=None)
def test_a_whole_number_is_itself_in_any_dress_and_no_other(number: int, form: str) -> None:
    assert judged(str(number), boxed(form.format(number))) == 1.0
    assert judged(form.format(number), boxed(str(number))) == 1.0
    assert judged(number, boxed(f"{number:,}")) == 1.0
    for other in (number + 1, number - 1, number * 10 + 1, -number or 1):
        assert judged(number, boxed(form.format(other))) == 0.0


@given(number=st.fractions(-1000, 1000, max_denominator=999))
@settings(max_examples=100, deadline=None)
def test_a_fraction_is_itself_in_any_dress_and_no_other(number: Fraction) -> None:
    whole, rest = divmod(abs(number.numerator), number.denominator)
    sign = "-" if number < 0 else ""
    forms = [
        str(number),
        rf"\frac{{{number.numerator}}}{{{number.denominator}}}",
        rf"{sign}\dfrac{{{abs(number.numerator)}}}{{{number.denominator}}}",
    ]
    if whole and rest:
        forms += [
            rf"{sign}{whole}\frac{{{rest}}}{{{number.denominator}}}",
            f"{sign}{whole} {rest}/{number.denominator}",
        ]
    if number.denominator > 1:
        forms.append(f"{float(number):.9f}")
    for gold in forms:
        for form in forms:
            assert judged(gold, boxed(form)) == 1.0, (gold, form)
        other = number + Fraction(1, 1000)
        assert judged(gold, boxed(f"{other.numerator}/{other.denominator}")) == 0.0


@given(items=st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), data=st.data())
@settings(max_examples=60, deadline=None)
def test_lists_in_any_order_and_tuples_in_theirs(items: list[int], data: st.DataObject) -> None:
    turned = data.draw(st.permutations(items))
    gold, other = ", ".join(map(str, items)), ", ".join(map(str, turned))
    assert judged(gold, boxed(other)) == judged(rf"\{{{gold}\}}", boxed(rf"\{{{other}\}}")) == 1.0
    assert judged(f"({gold})", boxed(f"({other})")) == float(turned == items)
    for wrong in (", ".join(map(str, items[1:])), f"{gold}, 100", ", ".join(map(str, [items[0] + 100, *items[1:]]))):
        assert judged(gold, boxed(wrong)) == judged(f"({gold})", boxed(f"({wrong})")) == 0.0


@pytest.mark.parametrize("gold", sorted({gold for gold, *_ in PAIRS if not gold.startswith(">")}))
def test_an_answer_equals_itself_and_no_guess(gold: str) -> None:
    assert judged(gold, boxed(gold)) == 1.0
    for guess in ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", r"\text{any of them}", "987654321", r"\{A, B, C, D, E\}", "?"):
        assert judged(gold, boxed(guess)) == 0.0


ASYMMETRIC = {("(1,2)", "2,1"), ("1,2", "(2,1)"), ("10:30", "1:3")}
"""What order means, and whether it is a time, the gold answer says."""
BARE = [(gold, response, verdict) for gold, response, verdict, _ in PAIRS if not (gold + response).count(">")]


@pytest.mark.parametrize(("gold", "response", "verdict"), BARE, ids=lambda value: str(value)[:40])
def test_either_may_be_the_gold_one(gold: str, response: str, verdict: int) -> None:
    if (gold, response) in ASYMMETRIC:
        verdict = 1 - verdict
    try:
        turned = judged(response, boxed(gold))
    except ValueError:  # what can be no gold answer
        turned = 0.0
    assert turned == verdict


BLOWN_UP = [
    "9^{9^{9^{9}}}", "10^{10^{10}}", "9**9**9**9", "1000000000!", "((9!)!)!", r"\binom{1000000000}{500000000}", r"\Gamma(10^{10})",
    r"\gcd(10^{10^9},3)", r"\sum_{k=1}^{1000000000} \frac{1}{k}", r"\prod_{k=1}^{1000000000} k", r"\sqrt{10^{10^{10}}}", r"e^{e^{e^{e^{10}}}}",
    r"2^{-10^{10}}", "(x+1)^{100000}", "(x+y+z)^{150}", r"\begin{pmatrix}10^{10^{10}}\\2\end{pmatrix}", "1e999999999", "1e9999", r"10^{10^{10}}, 3",
    r"0.5^{10^{10}}", r"7^{7^{7}} \mod 10", r"10^{10^{10}} < x", "9" * 5000, "(" * 3000 + "6" + ")" * 3000, r"\frac{1}{" * 100 + "6" + "}" * 100, "1," * 900,
]  # fmt: skip


@pytest.mark.parametrize("given", BLOWN_UP, ids=lambda given: given[:30])
def test_what_nobody_can_evaluate_is_wrong_and_costs_no_time(given: str) -> None:
    start = time.process_time()
    for answer in ("6", "x+1", "1, 2", "0.5"):
        assert judged(answer, boxed(given)) == 0.0
    assert time.process_time() - start < 5.0


def test_large_answers_are_compared_as_they_are_written() -> None:
    assert judged("2^{2^{100}}", boxed("2^{2^{100}}")) == 1.0
    assert judged("2^{2010}", boxed("4^{1005}")) == 1.0
    assert judged("2^{2010}", boxed("2^{2011}")) == 0.0
    assert judged("20!", boxed("2432902008176640000")) == 1.0


@pytest.mark.parametrize(
    "text",
    ["so 7 + 5 = 12, and " * 50_000, r"\boxed{" * 50_000, r"\boxed{1} " * 30_000, "$" * 500_001, "#### " * 100_000, "1" * 1_000_000, "1,234 " * 100_000, "the answer is " * 50_000, "<think>" * 100_000, "{" * 500_000, "- " * 300_000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_megabyte_of_anything_costs_little(text: str) -> None:
    start = time.process_time()
    assert judged("42", text) == 0.0
    assert time.process_time() - start < 5.0


def test_it_says_nothing_and_sets_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """The library's own time limits would replace an alarm of the caller's."""
    before = signal.getsignal(signal.SIGALRM)
    with caplog.at_level(logging.DEBUG):
        judged("0.75", r"\boxed{\frac{3}{4}}")
    assert signal.getsignal(signal.SIGALRM) is before
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_it_works_in_a_thread_and_in_a_worker_process() -> None:
    """Alarms would need a main thread."""
    rows = [
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"\boxed{x^2-1}", "(x-1)(x+1)", 1.0),
        (r"\boxed{x<3}", r"(-\infty,3)", 1.0),
    ]
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(judged(answer, response) for response, answer, _ in rows))
    thread.start()
    thread.join()
    items = [{"prompt": "p", "response": response, "fields": {"answer": answer}} for response, answer, _ in rows]
    with RulePool(RULE, workers=1, timeout_s=30.0) as pool:
        scores = pool.score(items)
    assert found == [score.value for score in scores] == [reward for *_, reward in rows]


def test_a_tower_of_powers_costs_no_worker() -> None:
    items = [
        {"prompt": "p", "response": rf"\boxed{{{text}}}", "fields": {"answer": "6"}}
        for text in ("6", "9^{9^{9^{9}}}", r"\frac{12}{2}")
    ]
    with RulePool(RULE, workers=1, timeout_s=30.0) as pool:
        scores = pool.score(items)
    assert [score.status for score in scores] == [Status.OK] * 3
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]
