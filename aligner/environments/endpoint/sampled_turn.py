"""A sampled turn as the program gets it, and as the chat template takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner.data.decoding import decode
from aligner.environments.conversation import ConversationFormat
from aligner.environments.reasoning import inner_reasoning, split_reasoning
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
    """The program sees less than was sampled (a stop text occurred, or it wanted one call alone), so that the conversation cannot go
    on from these ids."""


def read_turn(
    form: ConversationFormat,
    tokens: Sequence[int],
    stop_token_ids: Sequence[int],
    parser: ToolParser,
    stop: Sequence[str],
    place: str,
    tools: Sequence[Mapping[str, Any]] = (),
    opened: bool = False,
    several_calls: bool = True,
) -> ReadTurn:
    """Read a turn.

    Args:
        tokens: its ids, with the stop token where one was sampled.
        stop_token_ids: stop tokens of the request.
        stop: texts before which the answer ends.
        place: a digest, from which the ids of its calls are made.
        opened: the generation prompt has opened its reasoning.
        several_calls: False: the program gets the first call alone.
    """
    ended = tokens and (tokens[-1] in form.ends or tokens[-1] in stop_token_ids)
    text = decode(form.tokenizer, tokens[:-1] if ended else tokens, keep_special_tokens=True)
    parsed = parser(text, tools)
    ids = [f"{place[:7]}{number:02d}" for number in range(len(parsed.calls))]  # Mistral takes 9 letters and digits
    reasoning, content = _split(text, parsed, opened)
    reasoning, content = _without_special(form, reasoning).strip("\n"), _without_special(form, content)
    shown = _before(content, stop)
    returned: dict[str, Any] = {"role": "assistant", "content": shown}
    if reasoning:
        returned["reasoning_content"] = reasoning
    calls = parsed.calls if several_calls else parsed.calls[:1]
    if calls:
        returned["tool_calls"] = [
            {"id": name, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
            for name, call in zip(ids, calls, strict=False)
        ]
    whole = _before(_without_special(form, text), stop)
    return ReadTurn(
        whole, returned, call_message(parsed, text, ids), shown != content or len(calls) < len(parsed.calls)
    )


def _split(text: str, parsed: ParsedTurn, opened: bool) -> tuple[str, str]:
    """(reasoning, what follows it) of a turn."""
    if parsed.reasoning is not None:
        return parsed.reasoning, parsed.content
    reasoning, rest = split_reasoning(text, opened and not parsed.calls)
    visible = rest.lstrip("\n") if reasoning else rest
    return inner_reasoning(reasoning), parsed.content if parsed.calls else visible


def _without_special(form: ConversationFormat, text: str) -> str:
    for special in form.special_texts:
        text = text.replace(special, "")
    return text


def _before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these texts."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]
