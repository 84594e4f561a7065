"""A rule for answers of mathematics: equal in value, however they are written."""

from __future__ import annotations

import logging
import re
from itertools import product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from aligner.reward.rules import Unparsable

# It warns that its own time limit is off: ours, of the row, kills what it cannot interrupt.
logging.getLogger("math_verify").setLevel(logging.ERROR)
TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
NUMBER_AND_UNIT = re.compile(r"\$?([-+]?[\d][\d,]*(?:\.\d+)?(?:/\d+)?)\s+[A-Za-z][A-Za-z .]*")


def math_equivalent(prompt: str, response: str, *, answer: Any) -> float:
    """1 if the response's final answer equals `answer`, else 0; no answer is a wrong answer: 0.

    The final answer is what stands in the last \\boxed{}, else behind the last ####, else what math-verify finds
    (after "the answer is", in the last formula, the last number). `answer` may be in any of these forms too, or be the
    bare answer. Numbers are equal to 6 decimals, expressions, sets, intervals, matrices by SymPy; words by spelling.

    Raises:
        Unparsable: the two cannot be compared.
    """
    wanted, given = final_answer(str(answer)) or str(answer), final_answer(response)
    if given is not None and _spelling(given) == _spelling(wanted):
        return 1.0
    golds = _values(wanted)
    values = _values(given) if given is not None else _parse(_tidy(response))
    problem: Exception | None = None
    for gold, value in product(golds, values):
        try:
            if verify(gold, value, timeout_seconds=None, raise_on_error=True):
                return 1.0
        except Exception as error:
            problem = error
    if problem is not None:
        raise Unparsable(f"cannot be compared: {type(problem).__name__}: {problem}")
    return 0.0


def final_answer(text: str) -> str | None:
    """What stands in the last \\boxed{}, else behind the last ####; None where there is neither."""
    for start in reversed([match.end() for match in BOX.finditer(text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    _, found, rest = text.rpartition("####")
    return rest.strip().split("\n")[0] if found and rest.strip() else None


def _values(text: str) -> list[Any]:
    """A bare answer: as a formula, or as a number with its unit."""
    text = _tidy(text)
    with_unit = NUMBER_AND_UNIT.fullmatch(text)
    if with_unit:
        return _parse(with_unit.group(1))
    if "$" in text or r"\(" in text or r"\[" in text or not re.search(r"[A-Za-z\\^_{(\[]", text):
        return _parse(text)
    return _parse(f"${text}$") or _parse(text)


def _parse(text: str) -> list[Any]:
    found: list[Any] = parse(text, extraction_config=TARGETS, parsing_timeout=None)
    return found


def _tidy(text: str) -> str:
    """Forms that the parser takes for others: "- 3" for 3, "1e3" for 1."""
    text = re.sub(r"(?<![\w)}\]])-\s+(?=[\d\\.])", "-", text.strip())
    return re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)", r"$\1 \\cdot 10^{\2}$", text)


def _spelling(text: str) -> str:
    plain = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]+", " ", plain).strip().rstrip(".").casefold()
