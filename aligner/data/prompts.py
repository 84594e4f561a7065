"""Tokenize prompts for generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligner.data.answers import check_choices
from aligner.data.chat import PLAIN, ChatOptions, Notes, conversation_of, template_options
from aligner.data.left_out import TOO_LONG, LeftOut, left_out_text
from aligner.data.row_tokenizer import RowTooLongError, tokenize_rows
from aligner.data.sources.source import LabelledRow
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


class PromptTokenizer:
    """Rows with 'prompt' (text, or a list of messages) or 'messages', not ending with an assistant turn -> prompts (a
    `RowTokenizer`)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        too_long: str = "error",
        setting: str = "data.max_prompt_tokens",
        chat: ChatOptions = PLAIN,
        notes: Notes | None = None,
    ) -> None:
        """Args:
        max_tokens: longest prompt allowed, in tokens.
        too_long: "error", or "drop" to drop and count longer ones.
        setting: the setting that holds `max_tokens`, for errors.
        chat: how conversations are rendered.
        notes: counter of things to report about how rows were tokenized.
        """
        check_choices(too_long)
        self._tokenizer, self._chat, self._notes = tokenizer, chat, notes
        self._max_tokens, self._too_long, self._setting = max_tokens, too_long, setting
        self.left_out: LeftOut = Counter()

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[Prompt]:
        """The prompt of one row; none if it is too long and to be dropped.

        Raises:
            ValueError: neither or both keys, wrong type, empty or too long; names the row.
        """
        if isinstance(row.get("prompt"), list) and "messages" not in row:
            checked_messages(row["prompt"], label, "prompt")
            row = {"messages" if name == "prompt" else name: value for name, value in row.items()}
        text, tokens = _encode(row, label, self._tokenizer, self._chat, self._notes)
        if not tokens:
            raise ValueError(f"{label}: the prompt has no tokens.")
        if len(tokens) <= self._max_tokens:
            return [Prompt(tuple(tokens), text, row, index)]
        if self._too_long != "drop":
            raise RowTooLongError(
                f"{label}: the prompt has {len(tokens)} tokens, more than {self._setting}={self._max_tokens}; "
                f"raise it to {len(tokens)} or more, shorten the prompt, or drop such rows: data.too_long=drop."
            )
        self.left_out[TOO_LONG] += 1
        return []

    def none_left(self) -> str:
        """The error of a set without a prompt that can be used."""
        return f"no prompt is left ({left_out_text(self.left_out)}); raise {self._setting}={self._max_tokens}, or give other rows."


def tokenize_prompts(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    setting: str = "data.max_prompt_tokens",
    chat: ChatOptions = PLAIN,
    notes: Notes | None = None,
) -> list[Prompt]:
    """The prompts of all rows; raises ValueError for one that is too long (see `PromptTokenizer`)."""
    return tokenize_rows(rows, PromptTokenizer(tokenizer, max_tokens, "error", setting, chat, notes))


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
