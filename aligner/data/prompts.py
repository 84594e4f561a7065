"""Tokenize prompts for generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligner.data.answers import check_choices
from aligner.data.chat import PLAIN, ChatOptions, Notes, conversation_of, template_options
from aligner.data.jsonl import LabelledRow
from aligner.data.tokenizer import checked_messages, encode_plain, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt, as token ids for the rollout and as text for rewards and reports."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    text: str
    """The row's 'prompt', or its 'messages' as rendered by the chat template."""
    fields: dict[str, Any]
    """The JSON row (answer, ...)."""
    index: int
    """Position among the prompts that were kept, from 0; the row's prompt_index in `Samples`."""


def tokenize_prompts(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    setting: str = "data.max_prompt_tokens",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> list[Prompt]:
    """As `prompts_that_fit` with too_long="error": raises ValueError for a prompt that is too long."""
    return prompts_that_fit(rows, tokenizer, max_tokens, "error", setting, chat, notes)[0]


def prompts_that_fit(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: str,
    setting: str = "data.max_prompt_tokens",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> tuple[list[Prompt], int]:
    """Rows with 'prompt' (text) or 'messages' (not ending with an assistant turn) -> (prompts, number of rows dropped).

    Args:
        max_tokens: longest prompt allowed, in tokens.
        too_long: "error", or "drop" to drop and count longer ones.
        setting: the setting that holds `max_tokens`, for errors.
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.

    Raises:
        ValueError: neither or both keys, wrong type, empty, too long, or nothing left; names the row.
    """
    check_choices(too_long)
    prompts: list[Prompt] = []
    dropped = 0
    for label, row in rows:
        text, tokens = _encode(row, label, tokenizer, chat, notes)
        if not tokens:
            raise ValueError(f"{label}: the prompt has no tokens.")
        if len(tokens) <= max_tokens:
            prompts.append(Prompt(tuple(tokens), text, row, len(prompts)))
            continue
        if too_long != "drop":
            raise ValueError(
                f"{label}: the prompt has {len(tokens)} tokens, more than {setting}={max_tokens}; "
                f"raise it to {len(tokens)} or more, shorten the prompt, or drop such rows: data.too_long=drop."
            )
        dropped += 1
    if dropped and not prompts:
        raise ValueError(f"all {dropped} prompts are longer than {setting}={max_tokens}; raise it.")
    return prompts, dropped


def _encode(
    row: dict[str, Any],
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatOptions,
    notes: Notes | None,
) -> tuple[str, list[int]]:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{label}: a row needs 'prompt' or 'messages' (one of them); it has {sorted(row)}.")
    if "messages" in row:
        messages = checked_messages(row["messages"], label)
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"{label}: 'messages' ends with an assistant turn; remove it, the model generates it.")
        options = template_options(row, label, chat.template_kwargs)
        places = [f"messages[{turn}]" for turn in range(len(messages))]
        messages, places, _ = chat.with_system_prompt(messages, places, label)
        conversation = conversation_of(messages, places, options, label, tokenizer, awaits=True, notes=notes)
        text = conversation.text(len(messages), awaits=True)
        return text, encode_plain(tokenizer, text)  # the template has already added the begin token, if there is one
    text = row["prompt"]
    if not isinstance(text, str):
        raise ValueError(f"{label}: 'prompt' must be text, not {type(text).__name__} (conversations: 'messages').")
    if not text.strip():
        raise ValueError(f"{label}: 'prompt' is empty.")
    chat.check_text("prompt", label)
    return text, encode_text(tokenizer, text)
