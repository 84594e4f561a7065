"""A sampled turn as the program gets it, and as the chat template takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner.data.decoding import decode
from aligner.environments.conversation import ConversationFormat
from aligner.environments.tool_calls import ParsedTurn, ToolParser, call_message


@dataclass(frozen=True)
class ReadTurn:
    """A sampled turn, read."""

    text: str
    """All of it, without special tokens, up to the first stop text."""
    returned: dict[str, Any]
    """The assistant's message for the program: content, reasoning_content, tool_calls (arguments as JSON text)."""
    rendered: dict[str, Any]
    """The assistant's message for the chat template."""
    cut: bool
    """A stop text occurred: the program sees less than was sampled, so that the conversation cannot go on from these ids."""


def read_turn(
    form: ConversationFormat,
    tokens: Sequence[int],
    stop_token_ids: Sequence[int],
    parser: ToolParser,
    tools: Sequence[Mapping[str, Any]],
    stop: Sequence[str],
    place: str,
) -> ReadTurn:
    """Read a turn.

    Args:
        tokens: its ids, with the stop token where one was sampled.
        stop_token_ids: stop tokens of the request.
        stop: texts before which the answer ends.
        place: a digest, from which the ids of its calls are made.
    """
    ended = tokens and (tokens[-1] in form.ends or tokens[-1] in stop_token_ids)
    text = decode(form.tokenizer, tokens[:-1] if ended else tokens, keep_special_tokens=True)
    parsed = parser(text, tools)
    ids = [f"{place[:7]}{number:02d}" for number in range(len(parsed.calls))]  # Mistral takes 9 letters and digits
    reasoning, content = _split(text, parsed)
    reasoning, content = _without_special(form, reasoning).strip("\n"), _without_special(form, content)
    shown = _before(content, stop)
    returned: dict[str, Any] = {"role": "assistant", "content": shown}
    if reasoning:
        returned["reasoning_content"] = reasoning
    if parsed.calls:
        returned["tool_calls"] = [
            {"id": name, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
            for name, call in zip(ids, parsed.calls, strict=True)
        ]
    whole = _before(_without_special(form, text), stop)
    return ReadTurn(whole, returned, call_message(parsed, text, ids), shown != content)


def _split(text: str, parsed: ParsedTurn) -> tuple[str, str]:
    """(reasoning, what follows it) of a turn."""
    if parsed.reasoning is not None:
        return parsed.reasoning, parsed.content
    thought, closed, rest = text.rpartition("</think>")
    if not closed:
        if text.lstrip().startswith("<think>"):
            return text.lstrip().removeprefix("<think>"), ""  # it was cut off while it thought
        return "", parsed.content if parsed.calls else text
    thought = thought.lstrip().removeprefix("<think>")
    return thought, parsed.content if parsed.calls else rest.lstrip("\n")


def _without_special(form: ConversationFormat, text: str) -> str:
    for special in form.special_texts:
        text = text.replace(special, "")
    return text


def _before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these texts."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]
