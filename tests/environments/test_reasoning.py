"""What of a turn's text is its reasoning."""

from __future__ import annotations

import pytest

from aligner.environments.reasoning import inner_reasoning, split_reasoning


@pytest.mark.parametrize(
    ("text", "opened", "split", "inner"),
    [
        ("Four.", False, ("", "Four."), ""),
        ("<think>2+2</think>Four.", False, ("<think>2+2</think>", "Four."), "2+2"),
        ("2+2</think>Four.", True, ("2+2</think>", "Four."), "2+2"),
        ("2+2</think>Four.", False, ("2+2</think>", "Four."), "2+2"),
        ("\n<think>2+", False, ("\n<think>2+", ""), "2+"),
        ("2+", True, ("2+", ""), "2+"),
        ("<think>a</think>b</think>c", False, ("<think>a</think>b</think>", "c"), "a</think>b"),
        ("See <think>", False, ("", "See <think>"), ""),
    ],
)
def test_reasoning_is_split_from_what_follows(text: str, opened: bool, split: tuple[str, str], inner: str) -> None:
    assert split_reasoning(text, opened) == split
    assert inner_reasoning(split[0]) == inner
