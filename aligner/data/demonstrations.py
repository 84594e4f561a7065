"""Tokenize demonstrations (SFT data)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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

FORMS = (("prompt", "completion"), ("query", "response"))


class DemonstrationTokenizer:
    """Rows {'prompt', 'completion'}, {'query', 'response'} (texts or lists of messages) or {'messages'} -> demonstrations (a
    `RowTokenizer`).

    A conversation whose earlier turns the chat template rewrites gives several demonstrations (see `Encoder.turns`),
    which are kept or dropped independently.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        too_long: str = "error",
        train_on: str = "responses",
        chat: ChatOptions = PLAIN,
        notes: Notes | None = None,
    ) -> None:
        """Args:
        max_tokens: longest demonstration allowed, in tokens (data.max_tokens).
        too_long: "error", or "drop" to drop and count longer ones.
        train_on: "responses", or "all" for every token but the first. An assistant turn with "train": false or
            "weight": 0 is masked in both.
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.
        """
        check_choices(too_long, train_on)
        self._encoder = Encoder(tokenizer, train_on, chat, notes)
        self._max_tokens, self._too_long = max_tokens, too_long
        self.left_out: LeftOut = Counter()

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[TokenizedAnswer]:
        """The demonstrations of one row.

        Raises:
            ValueError: unknown form, wrong types, an empty part or too long; names the row.
        """
        demonstrations = _encode(row, label, self._encoder)
        kept = [
            demonstration
            for demonstration in demonstrations
            if fits(demonstration, "the demonstration", label, self._max_tokens, self._too_long)
        ]
        self.left_out[TOO_LONG] += len(demonstrations) - len(kept)
        return numbered(kept, index)

    def none_left(self) -> str:
        """The error of a set without a demonstration that can be used."""
        return (
            f"no demonstration is left ({left_out_text(self.left_out)}); raise data.max_tokens={self._max_tokens}, or give "
            "other rows."
        )


def tokenize_demonstrations(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str = "error",
    train_on: str = "responses",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> tuple[list[TokenizedAnswer], int]:
    """(demonstrations, rows dropped) of all rows; see `DemonstrationTokenizer`."""
    tokenize = DemonstrationTokenizer(tokenizer, max_tokens, too_long, train_on, chat, notes)
    return tokenize_rows(rows, tokenize), tokenize.left_out.total()


def _encode(row: dict[str, Any], label: str, encoder: Encoder) -> list[TokenizedAnswer]:
    forms = [keys for keys in FORMS if all(key in row for key in keys)]
    if len(forms) + ("messages" in row) != 1:
        accepted = "{'prompt', 'completion'}, {'query', 'response'} or {'messages'}"
        raise ValueError(f"{label}: a demonstration is one of {accepted}; this row has {sorted(row)}.")
    if forms:
        return encoder.answers(row, forms[0], label)
    messages = checked_messages(row["messages"], label)
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(f"{label}: 'messages' must not begin with an assistant turn, and must end with one.")
    places = [f"messages[{turn}]" for turn in range(len(messages))]
    return encoder.turns(messages, places, 0, label, row)
