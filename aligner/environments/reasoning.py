"""Reasoning inside a turn's text, between <think> and </think>: what of the text it is."""

from __future__ import annotations

OPENING, CLOSING = "<think>", "</think>"


def split_reasoning(text: str, opened: bool = False) -> tuple[str, str]:
    """(the turn up to the end of its reasoning, with the tags; what follows it).

    The reasoning ends with the last closing tag, and begins with the turn. One that was cut off while it thought is reasoning
    altogether; without tags nothing is.

    Args:
        opened: the generation prompt has opened the reasoning (its last word is <think>).
    """
    thought, closed, rest = text.rpartition(CLOSING)
    if not closed and (opened or text.lstrip().startswith(OPENING)):
        return text, ""
    return thought + closed, rest


def inner_reasoning(part: str) -> str:
    """The first part of `split_reasoning` without its tags."""
    return part.lstrip().removeprefix(OPENING).removesuffix(CLOSING)
