"""The rules, and finding one by its name."""

from pathlib import Path

import pytest

from aligner.reward.rules import answer_after_marker, exact_match, load_rule, regex_format


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#622", "622", 1.0),
        ("7+5+0=12 3+8+1=12 1+4+1=06# 622\n", 622, 1.0),
        ("#1#622", "622", 1.0),
        ("#622#1", "622", 0.0),
        ("#6220", "622", 0.0),
        ("622", "622", 0.0),
        ("#", "622", 0.0),
        ("", "", 0.0),
    ],
)
def test_answer_after_marker(response: str, answer: object, reward: float) -> None:
    assert answer_after_marker("p", response, answer=answer) == reward


def test_answer_after_another_marker() -> None:
    assert answer_after_marker("p", "so: #1 Answer: b", answer="b", marker="Answer:") == 1.0


def test_exact_match() -> None:
    assert exact_match("p", " Paris\n", answer="Paris") == 1.0
    assert exact_match("p", "paris", answer="Paris") == 0.0
    assert exact_match("p", "paris", answer="Paris", ignore_case=True) == 1.0
    assert exact_match("p", "Paris it is", answer="Paris") == 0.0
    assert exact_match("p", "7", answer=7) == 1.0


def test_regex_format() -> None:
    pattern = "<think>.*</think><answer>.+</answer>"
    assert regex_format("p", "<think>a\nb</think><answer>3</answer>\n", pattern=pattern) == 1.0
    assert regex_format("p", "well: <think>a</think><answer>3</answer>", pattern=pattern) == 0.0


def test_rules_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    assert load_rule("aligner.reward.rules.exact_match") is exact_match
    (tmp_path / "neighbour.py").write_text("VALUE = 3.0\n")
    (tmp_path / "json.py").write_text("from neighbour import VALUE\ndef rule(prompt, response): return VALUE\n")
    assert load_rule(f"{tmp_path}/json.py:rule")("", "") == 3.0
    import json

    assert json.loads("1") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exact_match", "neither package.module.function nor"),
        ("", "neither package.module.function nor"),
        ("absent_package.rules.fn", "cannot be imported: ModuleNotFoundError"),
        ("aligner.reward.rules.absent", "has no 'absent'"),
        ("aligner.reward.rules.__doc__", "is a str, not a function"),
        ("absent.py:fn", "cannot be imported: FileNotFoundError: no such file"),
    ],
)
def test_a_rule_that_cannot_be_found_names_the_setting(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward\.rule='{name}'.*{reason}"):
        load_rule(name)
