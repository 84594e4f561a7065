"""Prompts: what the rollout is asked, tokenized once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligner.data.answers import check_choices
from aligner.data.chat import Notes, conversation_of, template_options
from aligner.data.jsonl import LabelledRow
from aligner.data.tokenizer import checked_messages, encode_plain, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt, as tokens for the rollout and as text for rewards and readers."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    text: str
    """The row's 'prompt', or its 'messages' as the chat template writes them."""
    fields: dict[str, Any]
    """The whole JSON row (answer, ...)."""
    index: int
    """Position among the prompts that were kept, from 0."""


def tokenize_prompts(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    setting: str = "data.max_prompt_tokens",
    template_kwargs: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> list[Prompt]:
    """`prompts_that_fit`, where every prompt must."""
    return prompts_that_fit(rows, tokenizer, max_tokens, "error", setting, template_kwargs, notes)[0]


def prompts_that_fit(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str,
    setting: str = "data.max_prompt_tokens",
    template_kwargs: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> tuple[list[Prompt], int]:
    """Rows with 'prompt' (text) or 'messages' (a conversation that awaits an answer) -> (prompts, rows dropped).

    Args:
        max_tokens: longest prompt allowed, in tokens.
        too_long: "error", or "drop" to leave longer ones out and count them.
        setting: the configuration field that holds `max_tokens`, for the errors.
        template_kwargs: what the chat template is given for every row (data.chat_template_kwargs).
        notes: gets what a reader should know of how the rows were tokenized.

    Raises:
        ValueError: neither or both keys, wrong type, empty, too long, or nothing left; the row's label is named.
    """
    check_choices(too_long)
    prompts: list[Prompt] = []
    dropped = 0
    for label, row in rows:
        text, tokens = _encode(row, label, tokenizer, template_kwargs, notes)
        if not tokens:
            raise ValueError(f"{label}: the prompt has no tokens.")
        if len(tokens) <= max_tokens:
            prompts.append(Prompt(tuple(tokens), text, row, len(prompts)))
            continue
        if too_long != "drop":
            raise ValueError(
                f"{label}: the prompt has {len(tokens)} tokens, more than {setting}={max_tokens}; "
                f"raise it to {len(tokens)} or more, shorten the prompt, or leave such rows out: data.too_long=drop."
            )
        dropped += 1
    if dropped and not prompts:
        raise ValueError(f"all {dropped} prompts are longer than {setting}={max_tokens}; raise it.")
    return prompts, dropped


def _encode(
    row: dict[str, Any],
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    notes: Notes | None,
) -> tuple[str, list[int]]:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{label}: a row needs 'prompt' or 'messages' (one of them); it has {sorted(row)}.")
    if "messages" in row:
        messages = checked_messages(row["messages"], label)
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"{label}: 'messages' ends with an assistant's turn; a prompt must leave it to the model.")
        options = template_options(row, label, template_kwargs)
        places = [f"messages[{turn}]" for turn in range(len(messages))]
        conversation = conversation_of(messages, places, options, label, tokenizer, awaits=True, notes=notes)
        text = conversation.text(len(messages), awaits=True)
        return text, encode_plain(tokenizer, text)  # the template has written the begin token, if there is one
    text = row["prompt"]
    if not isinstance(text, str):
        raise ValueError(f"{label}: 'prompt' must be text, not {type(text).__name__} (conversations: 'messages').")
    if not text.strip():
        raise ValueError(f"{label}: 'prompt' is empty.")
    return text, encode_text(tokenizer, text)
