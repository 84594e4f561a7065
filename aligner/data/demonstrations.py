"""Tokenize demonstrations (SFT data)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aligner.data.answers import Encoder, check_choices, fits
from aligner.data.chat import PLAIN, ChatOptions, Notes
from aligner.data.jsonl import LabelledRow
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.data.tokenizer import checked_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = (("prompt", "completion"), ("query", "response"))


def tokenize_demonstrations(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str = "error",
    train_on: str = "responses",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> tuple[list[TokenizedAnswer], int]:
    """Rows {'prompt', 'completion'}, {'query', 'response'} (texts or lists of messages) or {'messages'} ->
    (demonstrations, rows dropped).

    Args:
        max_tokens: longest demonstration allowed, in tokens (data.max_tokens).
        too_long: "error", or "drop" to drop and count longer ones.
        train_on: "responses", or "all" for every token but the first. An assistant turn with "train": false or
            "weight": 0 is masked in both.
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.

    A conversation whose earlier turns the chat template rewrites gives several demonstrations (see `Encoder.turns`),
    which are kept or dropped independently.

    Raises:
        ValueError: unknown form, wrong types, an empty part, too long, or nothing left; names the row.
    """
    check_choices(too_long, train_on)
    demonstrations: list[TokenizedAnswer] = []
    dropped = 0
    encoder = Encoder(tokenizer, train_on, chat, notes)
    for label, row in rows:
        for demonstration in _encode(row, label, encoder):
            if fits(demonstration, "the demonstration", label, max_tokens, too_long):
                demonstrations.append(replace(demonstration, index=len(demonstrations)))
            else:
                dropped += 1
    if not demonstrations:
        raise ValueError(f"all {dropped} demonstrations are longer than data.max_tokens={max_tokens}; raise it.")
    return demonstrations, dropped


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
