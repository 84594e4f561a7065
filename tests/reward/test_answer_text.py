"""Answers in one way of writing."""

import pytest

from aligner.reward.answer_text import DOLLAR, split_list, tidy


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("−5", "-5"),
        ("１２", "12"),
        ("10⁻³", "10^{-3}"),
        ("x₁", "x_{1}"),
        ("1½", r"1\frac{1}{2}"),
        ("1 1/2", r"1\frac{1}{2}"),
        ("√2", r"\sqrt{2}"),
        ("sqrt(2(x+1))", r"\sqrt{2(x+1)}"),
        (r"1{,}234", "1234"),
        (r"10,\!080", "10080"),
        (r"10\,080", "10080"),
        ("1 234 567", "1234567"),
        ("12 34", "12 34"),
        ("1, 234", "1, 234"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        ("1e-3", r"1\times10^{-3}"),
        ("2^10", "2^{10}"),
        ("$18", f"{DOLLAR}18"),
        (r"\$18", f"{DOLLAR}18"),
        ("$18$", "18"),
        ("$5 and $6", f"{DOLLAR}5 and {DOLLAR}6"),
        (r"\(\dfrac{1}{2}\)", r"\frac{1}{2}"),
        (r"\left[0, 1\right)", "[0, 1)"),
        (r"\mathrm{~cm}", r"\text{ cm}"),
        (r"36^{\circ}", "36°"),
        ("5 percent", "5%"),
        (r"5^{\text{th}}", "5"),
        ("**12.**", "12"),
        ("The final answer is: 12.", "12"),
        ("- 3", "-3"),
        (r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}", r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}"),
    ],
)
def test_tidy(text: str, tidied: str) -> None:
    assert tidy(text) == tidied


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1, 2", ["1", "2"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        ("1 and 2", ["1", "2"]),
        ("1, 2, and 3", ["1", "2", "3"]),
        ("[0,1)", ["[0,1)"]),
        ("sand or land", ["sand", "land"]),
        (r"\begin{pmatrix}1,2\end{pmatrix}, 3", [r"\begin{pmatrix}1,2\end{pmatrix}", "3"]),
    ],
)
def test_split_list(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts
