"""A rule for answers of mathematics: equal in value, however they are written."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import product
from typing import Any

from aligner.reward.answer_forms import MessageLayout, is_prose
from aligner.reward.answer_reading import read
from aligner.reward.equivalence import same
from aligner.reward.final_answer import after_reasoning, boxed_answer, final_answer, last_value, said_answer, unfinished
from aligner.reward.rules import Unparsable, checked_by

__all__ = ["final_answer", "math_equivalent"]

LONGEST = 2000
"""Characters of a given answer that are read; one that is longer than this and than four times the gold one is wrong."""
LONGEST_GOLD = 10_000
SHORT = 300
"""Characters of a whole response that may be no more than an answer."""
SENTENCE = re.compile(r"(?!arc|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi)[A-Za-z]{2,}\s")
INTEGER = re.compile(r"[-+]?\d{1,18}")


def _settings_problem(kwargs: Any, timeout_s: float) -> str | None:
    if not isinstance(kwargs.get("boxed_only", False), bool):
        return f"kwargs.boxed_only={kwargs['boxed_only']!r} must be true or false."
    if not isinstance(kwargs.get("reasoning_end", ""), str):
        return f"kwargs.reasoning_end={kwargs['reasoning_end']!r} must be text, such as '</think>'; '' is for none."
    return None


@checked_by(_settings_problem, "boxed_only", "reasoning_end")
def math_equivalent(
    prompt: str, response: str, *, answer: Any, boxed_only: bool = False, reasoning_end: str = "</think>"
) -> float:
    r"""1 if the response's final answer equals `answer`, else 0; no answer, or one that cannot be read, is wrong: 0.

    The final answer stands in the last \boxed{}, else in <answer> tags, else behind the last ####, else behind "the
    answer is"; else the response is the answer, or its last formula or number is. What is equal: `same`; numbers with a
    decimal point to 6 decimals (and 4 significant digits), expressions, sets, intervals, matrices by math-verify and
    SymPy, words by spelling. A unit counts where both have one, "50%" is 0.5 and 50.

    Args:
        answer: text or a number, bare or in any of these forms; or a list of such, any of which is accepted.
        boxed_only: only a box counts.
        reasoning_end: what comes before its last occurrence is reasoning, where nothing counts; reasoning that has begun
            (the same without its slash) and has not ended has no answer yet. "": none.

    Raises:
        ValueError: `answer` is empty, null or nested, or cannot be read: the row's own fault, whatever the response.
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
            if same(gold, form):
                return 1.0
        except Exception as error:
            problem = error
    if problem is not None:
        raise Unparsable(f"cannot be compared: {type(problem).__name__}: {problem}")
    return 0.0


def _golds(answer: Any) -> list[tuple[str, MessageLayout]]:
    accepted = answer if isinstance(answer, list | tuple) else [answer]
    if not accepted:
        raise ValueError("answer=[] accepts nothing; give the answer as text or a number, or a list of accepted ones.")
    for one in accepted:
        if not isinstance(one, str | int | float) or (isinstance(one, float) and not math.isfinite(one)):
            raise ValueError(
                f"answer={one!r:.80} is not possible; give the answer as text or a number, or a list of accepted ones."
            )
    return [_gold(str(one)) for one in accepted]


@lru_cache(maxsize=4096)
def _gold(text: str) -> tuple[str, MessageLayout]:
    said = final_answer(text)
    said = text if said is None else said
    forms = _values(said) if len(said) <= LONGEST_GOLD else []
    if not forms:
        raise ValueError(f"answer={text[:80]!r} cannot be read as a number, a formula, a list or words.")
    return said.strip(), forms[0]


def _values(text: str) -> list[MessageLayout]:
    """What a bare answer says; empty where it cannot be read."""
    form = read(text)
    return [] if form is None else [form]


def _given(response: str, boxed_only: bool, reasoning_end: str) -> str | None:
    text = after_reasoning(response, reasoning_end)
    if text is None or unfinished(text):
        return None
    marked = boxed_answer(text) if boxed_only else final_answer(text)
    if marked is not None or boxed_only:
        return marked
    said, announced = said_answer(text)
    form = read(said) if len(said) <= (LONGEST if announced else SHORT) else None
    if form is not None and not is_prose(form) and (announced or not SENTENCE.match(said)):
        return said
    # A sentence around the answer, or an answer in words.
    return last_value(said, first=announced) or (said if form is not None else last_value(text))
