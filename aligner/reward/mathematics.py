"""Rule for mathematical answers: compares values, independent of notation."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import product
from typing import Any

from aligner.reward.answer_forms import Answer, is_prose
from aligner.reward.answer_reading import parse_answer
from aligner.reward.equivalence import equivalent
from aligner.reward.final_answer import (
    after_reasoning,
    announced_answer,
    boxed_answer,
    final_answer,
    last_value,
    unfinished,
)
from aligner.reward.rules import Unparsable, checked_by

__all__ = ["final_answer", "math_equivalent"]

LONGEST = 2000
"""Longest given answer in characters; longer than this and than four times the gold answer is wrong."""
LONGEST_GOLD = 10_000
SHORT = 300
"""Longest response in characters that may be just an answer."""
SENTENCE = re.compile(r"(?!arc|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi)[A-Za-z]{2,}\s")
INTEGER = re.compile(r"[-+]?\d{1,18}")


def _settings_problem(kwargs: Any, timeout_s: float) -> str | None:
    if not isinstance(kwargs.get("boxed_only", False), bool):
        return f"kwargs.boxed_only={kwargs['boxed_only']!r} must be true or false."
    if not isinstance(kwargs.get("reasoning_end", ""), str):
        return f"kwargs.reasoning_end={kwargs['reasoning_end']!r} must be text, such as '</think>'; '' for none."
    return None


@checked_by(_settings_problem, "boxed_only", "reasoning_end")
def math_equivalent(
    prompt: str, response: str, *, answer: Any, boxed_only: bool = False, reasoning_end: str = "</think>"
) -> float:
    r"""1 if the response's final answer equals `answer`, else 0. No answer, or one that cannot be parsed, is wrong: 0.

    The final answer is taken from the last \boxed{}, else <answer> tags, else after the last ####, else after "the
    answer is"; else it is the whole response, or its last formula or number. Equality is that of `equivalence.equivalent`:
    decimals to 6 places (and 4 significant digits); expressions, sets, intervals and matrices by math-verify and SymPy;
    words by spelling. Units are compared if both have one; "50%" equals 0.5 and 50.

    Args:
        answer: text or a number, bare or in any of these forms; or a list of accepted answers.
        boxed_only: accept only a boxed answer.
        reasoning_end: end tag of the reasoning, which is ignored; reasoning that is opened (the tag without its slash)
            and not closed has no answer. "": no reasoning.

    Raises:
        ValueError: `answer` is empty, null, nested or cannot be parsed (an error in the data, whatever the response).
        Unparsable: SymPy cannot compare the two.
    """
    golds = _golds(answer)
    given = _given(response, boxed_only, reasoning_end)
    if given is None:
        return 0.0
    texts = [text for text, _ in golds]
    if INTEGER.fullmatch(given) and all(INTEGER.fullmatch(text) for text in texts):
        return float(any(int(given) == int(text) for text in texts))
    if len(given) > max(LONGEST, *(4 * len(text) for text in texts)):
        return 0.0
    problem: Exception | None = None
    for (_, gold), form in product(golds, _values(given)):
        try:
            if equivalent(gold, form):
                return 1.0
        except Exception as error:
            problem = error
    if problem is not None:
        raise Unparsable(f"cannot be compared: {type(problem).__name__}: {problem}")
    return 0.0


def _golds(answer: Any) -> list[tuple[str, Answer]]:
    accepted = answer if isinstance(answer, list | tuple) else [answer]
    if not accepted:
        raise ValueError("answer=[] accepts nothing; give the answer as text or a number, or a list of accepted ones.")
    for item in accepted:
        if not isinstance(item, str | int | float) or (isinstance(item, float) and not math.isfinite(item)):
            raise ValueError(
                f"answer={item!r:.80} is not possible; give the answer as text or a number, or a list of accepted ones."
            )
    return [_gold(str(item)) for item in accepted]


@lru_cache(maxsize=4096)
def _gold(text: str) -> tuple[str, Answer]:
    final = final_answer(text)
    final = text if final is None else final
    forms = _values(final) if len(final) <= LONGEST_GOLD else []
    if not forms:
        raise ValueError(f"answer={text[:80]!r} cannot be parsed as a number, a formula, a list or words.")
    return final.strip(), forms[0]


def _values(text: str) -> list[Answer]:
    """The parsed answer as a list of one; empty if it cannot be parsed."""
    form = parse_answer(text)
    return [] if form is None else [form]


def _given(response: str, boxed_only: bool, reasoning_end: str) -> str | None:
    text = after_reasoning(response, reasoning_end)
    if text is None or unfinished(text):
        return None
    marked = boxed_answer(text) if boxed_only else final_answer(text)
    if marked is not None or boxed_only:
        return marked
    candidate, announced = announced_answer(text)
    form = parse_answer(candidate) if len(candidate) <= (LONGEST if announced else SHORT) else None
    if form is not None and not is_prose(form) and (announced or not SENTENCE.match(candidate)):
        return candidate
    # A sentence around the answer, or an answer in words.
    return last_value(candidate, first=announced) or (candidate if form is not None else last_value(text))
