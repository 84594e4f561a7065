"""Tokenize preference data (chosen and rejected answers) and feedback data (single answers labelled good or bad)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aligner.data.answers import Encoder, check_choices, fits
from aligner.data.chat import PLAIN, ChatOptions, Notes
from aligner.data.left_out import TOO_LONG, LeftOut, left_out_text
from aligner.data.row_tokenizer import numbered, tokenize_rows
from aligner.data.sources.source import LabelledRow
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.data.tokenizer import checked_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_FORMS = "{'prompt', 'chosen', 'rejected'} or {'query', 'response': [...], 'score': [...]}"
FEEDBACK_FORMS = "{'prompt', 'completion', 'label'} or {'prompt', 'chosen', 'rejected'}"
SCORES = {"chosen": "score_chosen", "rejected": "score_rejected"}
EQUAL_SCORES = "equal scores"


@dataclass(frozen=True)
class Pair:
    """The chosen and the rejected answer to one prompt; both have the pair's index."""

    chosen: TokenizedAnswer
    rejected: TokenizedAnswer


class _AnswersTokenizer:
    """What tokenizers of rows with good and bad answers have in common."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        too_long: str = "error",
        chat: ChatOptions = PLAIN,
        notes: Notes | None = None,
    ) -> None:
        """Args:
        max_tokens: longest prompt plus answer allowed, in tokens (data.max_tokens).
        too_long: "error", or "drop" to drop pairs with a longer side and count them as "too long".
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.
        """
        check_choices(too_long)
        self._encoder = Encoder(tokenizer, chat=chat, notes=notes)
        self._max_tokens, self._too_long = max_tokens, too_long
        self.left_out: LeftOut = Counter()


class PreferenceTokenizer(_AnswersTokenizer):
    """Preference rows -> pairs (a `RowTokenizer`).

    A row is {'prompt', 'chosen', 'rejected'} with texts or lists of messages; {'chosen', 'rejected'} with two whole
    conversations that diverge at an assistant turn; or {'query', 'response', 'score'} with lists of answers and scores,
    which gives all pairs of unequal scores (pairs of equal ones are counted as "equal scores"). If scores are known
    ('score', or 'score_chosen' and 'score_rejected'), each answer's fields have its own as 'score'.
    """

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[Pair]:
        """The pairs of one row.

        Raises:
            ValueError: unknown form, wrong types, an empty part, equal answers or too long; names the row.
        """
        if _is_scored(row, label, PAIR_FORMS):
            row_pairs, ties = _scored_pairs(row, label, self._encoder)
        else:
            row_pairs, ties = [_two_answers(row, label, self._encoder)], 0
        pairs: list[Pair] = []
        for sides in row_pairs:
            if sides[0].tokens == sides[1].tokens:
                raise ValueError(
                    f"{label}: chosen and rejected are the same {len(sides[0].tokens)} tokens; drop the row."
                )
            if all(fits(side, "an answer with its prompt", label, self._max_tokens, self._too_long) for side in sides):
                chosen, rejected = (replace(side, index=index + len(pairs)) for side in sides)
                pairs.append(Pair(chosen, rejected))
        self.left_out[EQUAL_SCORES] += ties
        self.left_out[TOO_LONG] += len(row_pairs) - len(pairs)
        return pairs

    def none_left(self) -> str:
        """The error of a set without a pair that can be used."""
        return f"no pair is left ({left_out_text(self.left_out)}); raise data.max_tokens={self._max_tokens}, or give other rows."


class FeedbackTokenizer(_AnswersTokenizer):
    """Feedback rows -> answers with 'label' in their fields (a `RowTokenizer`).

    A row is {'prompt', 'completion', 'label': true or false} with texts or lists of messages, or a preference row (one
    good and one bad answer). Each answer counts by itself.
    """

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[TokenizedAnswer]:
        """The answers of one row.

        Raises:
            ValueError: as for `PreferenceTokenizer`; also for rows with scores, which define no threshold for "good".
        """
        answers = _labelled(row, label, self._encoder)
        kept = [
            answered
            for answered in answers
            if fits(answered, "an answer with its prompt", label, self._max_tokens, self._too_long)
        ]
        self.left_out[TOO_LONG] += len(answers) - len(kept)
        return numbered(kept, index)

    def none_left(self) -> str:
        """The error of a set without an answer that can be used."""
        return f"no answer is left ({left_out_text(self.left_out)}); raise data.max_tokens={self._max_tokens}."


def tokenize_preferences(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str = "error",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> tuple[list[Pair], LeftOut]:
    """(pairs, counts of what was left out) of all rows; see `PreferenceTokenizer`."""
    tokenize = PreferenceTokenizer(tokenizer, max_tokens, too_long, chat, notes)
    return tokenize_rows(rows, tokenize), +tokenize.left_out


def tokenize_feedback(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str = "error",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> tuple[list[TokenizedAnswer], LeftOut]:
    """(answers, counts of what was left out) of all rows; see `FeedbackTokenizer`."""
    tokenize = FeedbackTokenizer(tokenizer, max_tokens, too_long, chat, notes)
    return tokenize_rows(rows, tokenize), +tokenize.left_out


def _labelled(row: dict[str, Any], label: str, encoder: Encoder) -> list[TokenizedAnswer]:
    is_feedback = "completion" in row or "label" in row
    if is_feedback and "prompt" in row and "completion" in row and "chosen" not in row:
        if not isinstance(row.get("label"), bool):
            raise ValueError(f"{label}: 'label' must be true or false, not {row.get('label')!r}.")
        return [encoder.answer(row, ("prompt", "completion"), label)]
    if is_feedback or _is_scored(row, label, FEEDBACK_FORMS):
        raise ValueError(f"{label}: feedback is one of {FEEDBACK_FORMS}; this row has {sorted(row)}.")
    sides = zip(_two_answers(row, label, encoder), (True, False), strict=True)
    return [replace(side, fields={**side.fields, "label": good}) for side, good in sides]


def _is_scored(row: dict[str, Any], label: str, forms: str) -> bool:
    """Whether the row is of the form {'query', 'response', 'score'} rather than {'chosen', 'rejected'}.

    Raises:
        ValueError: it is neither, or both.
    """
    scored = all(key in row for key in ("query", "response", "score"))
    compared = all(key in row for key in ("chosen", "rejected"))
    if scored == compared:
        raise ValueError(f"{label}: a row is one of {forms}; this row has {sorted(row)}.")
    return scored


def _two_answers(row: dict[str, Any], label: str, encoder: Encoder) -> tuple[TokenizedAnswer, TokenizedAnswer]:
    """The chosen and the rejected answer."""
    parts = _whole_conversations(row, label) if _has_whole_conversations(row) else row
    if "prompt" not in parts:
        raise ValueError(f"{label}: 'prompt' may only be omitted if 'chosen' and 'rejected' are lists of messages.")
    scores = _side_scores(row, label)
    sides = []
    for key in SCORES:
        answered = encoder.answer(parts, ("prompt", key), label)
        sides.append(replace(answered, fields={**row, **({"score": scores[key]} if scores else {})}))
    return sides[0], sides[1]


def _has_whole_conversations(row: dict[str, Any]) -> bool:
    """Whether 'chosen' and 'rejected' are whole conversations: lists of messages, and 'prompt' is not one (some data sets
    repeat the question in it as text)."""
    return all(isinstance(row[key], list) for key in SCORES) and not isinstance(row.get("prompt"), list)


def _whole_conversations(row: dict[str, Any], label: str) -> dict[str, Any]:
    """Split two whole conversations into their common prefix ('prompt') and the rest."""
    chosen, rejected = (checked_messages(row[key], label, key) for key in SCORES)
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    rest = [side[common : common + 1] for side in (chosen, rejected)]
    if common == 0 or not all(turn and turn[0]["role"] == "assistant" for turn in rest):
        raise ValueError(
            f"{label}: 'chosen' and 'rejected' without a 'prompt' must be conversations with a common prefix that "
            f"diverge at an assistant turn; these diverge at message {common}. Give the common messages as 'prompt'."
        )
    return {**row, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _side_scores(row: dict[str, Any], label: str) -> dict[str, float]:
    """{'chosen': ..., 'rejected': ...} if the row has 'score_chosen' and 'score_rejected', else {}."""
    if not all(key in row for key in SCORES.values()):
        return {}
    scores = {side: _number(row[key], f"{label}: {key!r}") for side, key in SCORES.items()}
    if scores["chosen"] < scores["rejected"]:
        raise ValueError(
            f"{label}: 'score_chosen' {scores['chosen']} is below 'score_rejected' {scores['rejected']}; swap the "
            "two answers, or remove the scores."
        )
    return scores


def _scored_pairs(
    row: dict[str, Any], label: str, encoder: Encoder
) -> tuple[list[tuple[TokenizedAnswer, TokenizedAnswer]], int]:
    """(all pairs with the higher score first, in the row's order; number of pairs with equal scores)."""
    responses, scores = row["response"], row["score"]
    if not isinstance(responses, list) or not isinstance(scores, list) or not len(responses) == len(scores) >= 2:
        raise ValueError(f"{label}: 'response' and 'score' must be lists of one length, 2 or more.")
    answers = []
    for place, (response, score) in enumerate(zip(responses, scores, strict=True)):
        answered = encoder.answer({**row, f"response[{place}]": response}, ("query", f"response[{place}]"), label)
        answers.append(replace(answered, fields={**row, "score": _number(score, f"{label}: score[{place}]")}))
    pairs = [(a, b) for a in answers for b in answers if a.fields["score"] > b.fields["score"]]
    return pairs, len(answers) * (len(answers) - 1) // 2 - len(pairs)


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of floats
        value = math.inf
    raise ValueError(f"{name} must be a finite number, not {value!r}.")
