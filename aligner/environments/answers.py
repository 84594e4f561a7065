"""Check what an environment process answered, and make it a `Turn` or a final reward."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from aligner.environments.protocol import Turn

ROLES = ("user", "tool", "system", "assistant")


class WrongAnswerError(ValueError):
    """The answer has not the agreed form; the text says where."""


def turn_of(answer: Any) -> Turn:
    """A turn from JSON.

    Raises:
        WrongAnswerError: it is not of the form of `Turn`.
    """
    if not isinstance(answer, dict):
        raise WrongAnswerError(f"a turn is a {type(answer).__name__}, not an object")
    messages = answer.get("messages", [])
    if not isinstance(messages, list):
        raise WrongAnswerError(f"messages are a {type(messages).__name__}, not a list")
    for message in messages:
        _check_message(message)
    done, replaces = answer.get("done", False), answer.get("replaces", False)
    for name, flag in (("done", done), ("replaces", replaces)):
        if not isinstance(flag, bool):
            raise WrongAnswerError(f"{name} is {flag!r}, neither true nor false")
    tools = answer.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise WrongAnswerError("tools are not a list of JSON schemas")
    return Turn(messages, done, _reward(answer.get("reward")), _metrics(answer.get("metrics")), tools, replaces)


def final_of(answer: Any) -> tuple[float | None, Mapping[str, float]]:
    """(final reward, metrics) from JSON. Raises WrongAnswerError."""
    if not isinstance(answer, dict):
        raise WrongAnswerError(f"a final reward is a {type(answer).__name__}, not an object")
    return _reward(answer.get("reward")), _metrics(answer.get("metrics"))


def seconds_of(answer: Mapping[str, Any]) -> float:
    """The time that a call has taken; 0 where the answer does not say it."""
    seconds = answer.get("seconds")
    return seconds if isinstance(seconds, float) and 0 <= seconds < math.inf else 0.0


def thread_of(answer: Mapping[str, Any]) -> tuple[int, ...]:
    """What a call that has begun says of its thread; nothing where it is not of the agreed form."""
    thread = answer.get("begun")
    return tuple(thread) if isinstance(thread, list) and [type(one) for one in thread] == 3 * [int] else ()


def same_as_before(turn: Turn) -> str:
    """What must be equal when an action is replayed: everything but the metrics (times, counts of retries).

    Raises:
        WrongAnswerError: it is nested too deeply to be kept.
    """
    kept = [list(turn.messages), turn.done, turn.reward, turn.tools and list(turn.tools), turn.replaces]
    try:
        return json.dumps(kept, sort_keys=True)
    except RecursionError:
        raise WrongAnswerError("a turn is nested too deeply") from None


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise WrongAnswerError(f"a message is a {type(message).__name__}, not an object")
    if message.get("role") not in ROLES:
        raise WrongAnswerError(f"a message's role is {message.get('role')!r}; use {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise WrongAnswerError(f"a message's content is a {type(message.get('content')).__name__}, not text")


def _reward(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongAnswerError(f"the reward is {repr(value)[:80]}, not a number")
    if not math.isfinite(reward := _float(value)):
        raise WrongAnswerError(f"the reward is {reward}")
    return reward


def _metrics(values: Any) -> Mapping[str, float]:
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise WrongAnswerError("metrics are not an object of numbers")
    numbers = {name: _float(value) for name, value in values.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _float(value: int | float) -> float:
    """Infinity for whole numbers that are too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
