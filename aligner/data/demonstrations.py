"""Demonstrations: sequences to imitate, tokenized as the model would meet and produce them, and their stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aligner.data.jsonl import LabelledRow
from aligner.data.stream import RowStream
from aligner.data.tokenizer import Message, checked_messages, encode_continuation, encode_text, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = (("prompt", "completion"), ("query", "response"))


@dataclass(frozen=True)
class Demonstration:
    """One sequence and which of its tokens are trained on."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    mask: tuple[bool, ...]
    """Per token: trained on (the answer and its end token), or only read (the prompt)."""
    fields: dict[str, Any]
    """The whole JSON row."""

    @property
    def prompt_len(self) -> int:
        """Tokens before the first trained one."""
        return self.mask.index(True)


def tokenize_demonstrations(
    rows: Iterable[LabelledRow],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: Literal["error", "drop"] = "error",
) -> tuple[list[Demonstration], int]:
    """Rows {'prompt', 'completion'}, {'query', 'response'} or {'messages'} -> (demonstrations, rows dropped).

    Args:
        max_tokens: longest demonstration allowed, in tokens (data.max_tokens).
        too_long: "error", or "drop" to leave longer ones out and count them.

    Raises:
        ValueError: an unknown form, wrong types, an empty part, too long, or nothing left; the row's label is named.
    """
    if too_long not in ("error", "drop"):
        raise ValueError(f"data.too_long={too_long!r} is unknown; use error or drop.")
    demonstrations: list[Demonstration] = []
    dropped = 0
    for label, row in rows:
        tokens, mask = _encode(row, label, tokenizer)
        if len(tokens) <= max_tokens:
            demonstrations.append(Demonstration(tuple(tokens), tuple(mask), row))
        elif too_long == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"{label}: the demonstration has {len(tokens)} tokens, more than data.max_tokens={max_tokens}; "
                f"raise it to {len(tokens)} or more, or set data.too_long=drop."
            )
    if not demonstrations:
        raise ValueError(f"all {dropped} demonstrations are longer than data.max_tokens={max_tokens}; raise it.")
    return demonstrations, dropped


def _encode(row: dict[str, Any], label: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    forms = [pair for pair in PAIRS if all(key in row for key in pair)]
    if len(forms) + ("messages" in row) != 1:
        wanted = "{'prompt', 'completion'}, {'query', 'response'} or {'messages'}"
        raise ValueError(f"{label}: a demonstration is one of {wanted}; this row has {sorted(row)}.")
    if not forms:
        return _encode_conversation(checked_messages(row["messages"], label), label, tokenizer)
    for key in forms[0]:
        if not isinstance(row[key], str):
            raise ValueError(f"{label}: {key!r} must be text, not {type(row[key]).__name__}.")
        if not row[key].strip():
            raise ValueError(f"{label}: {key!r} is empty.")
    prompt, completion = (row[key] for key in forms[0])
    # Encoded apart: in generation the prompt stands alone, so no token may reach across the border.
    read = encode_text(tokenizer, prompt)
    trained = _ended(encode_continuation(tokenizer, completion), tokenizer)
    return read + trained, [False] * len(read) + [True] * len(trained)


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    assert tokenizer.eos_token_id is not None, "load_tokenizer refuses a tokenizer without one"
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def _encode_conversation(
    messages: list[Message], label: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Train every assistant's turn: what the template adds when that turn is appended to the prompt before it."""
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(f"{label}: 'messages' must begin with another's turn and end with an assistant's.")
    whole = render_chat(tokenizer, messages, label, add_generation_prompt=False)
    tokens: list[int] = []
    mask: list[bool] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["content"].strip():
            raise ValueError(f"{label}: messages[{turn}] is an assistant's turn with an empty 'content'.")
        before = render_chat(tokenizer, messages[:turn], label, add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: turn + 1], label, add_generation_prompt=False)
        # A template may write a turn otherwise once more follows (dropped reasoning); then the tokens would be wrong.
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"{label}: the chat template does not write messages[:{turn + 1}] as a beginning of the whole "
                "conversation; give one row for each assistant's turn, or another chat_template."
            )
        read = encode_continuation(tokenizer, before[len(done) :])
        trained, rest = _split_turn(encode_continuation(tokenizer, after[len(before) :]), tokenizer)
        tokens += read + trained + rest
        mask += [False] * len(read) + [True] * len(trained) + [False] * len(rest)
        done = after
    return _with_end(tokens, mask, tokenizer)


def _split_turn(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A turn -> (what the model produces, the blanks that the template adds after the turn's closing token)."""
    special = set(tokenizer.all_special_ids)
    end = len(tokens)
    while end and tokens[end - 1] not in special and not str(tokenizer.decode([tokens[end - 1]])).strip():
        end -= 1
    closed = end > 0 and tokens[end - 1] in special
    return (tokens[:end], tokens[end:]) if closed else (tokens, [])


def _with_end(tokens: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Append the end token if the template closes the last turn with no special token: else nothing teaches to stop."""
    last_trained = len(mask) - 1 - mask[::-1].index(True)
    if tokens[last_trained] in tokenizer.all_special_ids:
        return tokens, mask
    ended = _ended(tokens, tokenizer)
    return ended, mask + [True] * (len(ended) - len(tokens))


class DemonstrationStream(RowStream[Demonstration]):
    """Demonstrations for one step after another."""

    def next(self, batch: int) -> list[Demonstration]:
        """The next `batch` demonstrations."""
        return self.take(batch)
