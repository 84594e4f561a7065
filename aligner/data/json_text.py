"""Lists and objects that a column holds as JSON text, as tables without nested columns do."""

from __future__ import annotations

import json
from typing import Any

CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected", "conversations")
"""Columns whose text, where it is a JSON list of messages (of which each says something), is a conversation."""


def parsed(value: Any) -> Any:
    """The list or object in JSON text; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        held = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return held if isinstance(held, (list, dict)) else value


def with_conversations(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the conversations that it holds as JSON text."""
    changed = {name: messages for name in CONVERSATIONS if (messages := _messages(row.get(name))) is not None}
    return {**row, **changed} if changed else row


def _messages(value: Any) -> list[Any] | None:
    """The messages in JSON text of a list of them; None: it is something else."""
    held = parsed(value) if isinstance(value, str) else None
    if not isinstance(held, list) or not held:
        return None
    return held if all(isinstance(turn, dict) and _is_message(turn) for turn in held) else None


def _is_message(turn: dict[str, Any]) -> bool:
    """Whether it has a speaker and what was said: an answer may be JSON too, whose objects have a "role" or a "from"."""
    if "role" in turn and any(name in turn for name in ("content", "tool_calls", "function_call")):
        return True
    return "from" in turn and "value" in turn
