"""Environments of kind `steps`: a class with `reset(row, seed)` and `step(text)`, one object for each episode.

An observation is text (a user message), a message, a list of messages, or None. `step` returns an observation alone, (observation,
reward, done), (observation, reward, done, metrics), Gymnasium's (observation, reward, terminated, truncated, info), or a dict or
an object with any of observation (or messages), reward, done, metrics. `step(text, tool_calls)` also gets the parsed tool calls, if it
has that parameter. `get_reward()` gives a final reward, where there is one. `tools` is a list of JSON schemas. All may be async.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

FIELDS = ("observation", "messages", "reward", "done", "metrics")


def make(host: Host) -> Callable[[], Steps]:
    """See the package."""
    target = host.load(host.target)
    if not callable(target):
        raise host.Unusable(f"environment.target={host.target} is a {type(target).__name__}, not a class")
    for name in ("reset", "step"):
        if inspect.isclass(target) and not callable(getattr(target, name, None)):
            raise host.Unusable(f"environment.target={host.target} has no {name}(); kind=steps needs reset and step")
    try:
        inspect.signature(target).bind(**host.options)
    except TypeError as error:
        raise host.Unusable(f"environment.options do not fit environment.target={host.target}: {error}") from None
    except ValueError:  # it has no signature
        pass
    return lambda: Steps(host, target)


class Steps:
    """One episode."""

    def __init__(self, host: Host, target: Callable[..., Any]) -> None:
        self._host = host
        self._environment = host.resolve(target(**host.options))

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        reset = self._environment.reset
        names = inspect.signature(reset).parameters
        if "options" in names and "row" not in names:  # Gymnasium's
            returned = self._host.resolve(reset(seed=seed, options=row))
        else:
            returned = self._host.resolve(reset(row, seed))
        turn = self._turn(returned[0] if isinstance(returned, tuple) else returned)
        tools = getattr(self._environment, "tools", None)
        return turn if tools is None else {**turn, "tools": list(tools)}

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        step = self._environment.step
        takes_calls = "tool_calls" in inspect.signature(step).parameters
        returned = self._host.resolve(step(text, tool_calls) if takes_calls else step(text))
        if not isinstance(returned, tuple):
            return self._turn(returned)
        if len(returned) == 5:
            observation, reward, terminated, truncated, metrics = returned
            done = self._flag(terminated) or self._flag(truncated)
        elif len(returned) in (3, 4):
            observation, reward, done, metrics = (*returned, {})[:4]
        else:
            raise self._host.WrongAnswer(
                f"step returned a tuple of {len(returned)}; return (observation, reward, done)"
            )
        return self._whole(observation, reward, done, metrics)

    def finish(self) -> dict[str, Any]:
        get_reward = getattr(self._environment, "get_reward", None)
        return {"reward": self._host.resolve(get_reward()) if callable(get_reward) else None}

    def close(self) -> None:
        close = getattr(self._environment, "close", None)
        if callable(close):
            self._host.resolve(close())

    def _turn(self, returned: Any) -> dict[str, Any]:
        """A turn from an observation, a dict of fields or an object with them."""
        if isinstance(returned, dict) and not set(returned) & {"role"}:
            unknown = sorted(set(returned) - set(FIELDS))
            if unknown:
                raise self._host.WrongAnswer(
                    f"a turn has {', '.join(map(str, unknown))}; it may have {', '.join(FIELDS)}"
                )
            fields = returned
        elif any(hasattr(returned, name) for name in ("observation", "messages")):
            fields = {name: getattr(returned, name) for name in FIELDS if hasattr(returned, name)}
        else:
            fields = {"observation": returned}
        observation = fields.get("messages", fields.get("observation"))
        return self._whole(observation, fields.get("reward"), fields.get("done", False), fields.get("metrics") or {})

    def _whole(self, observation: Any, reward: Any, done: Any, metrics: Any) -> dict[str, Any]:
        numbers = {name: value for name, value in dict(metrics).items() if isinstance(value, (int, float))}
        messages = self._host.messages(observation)
        return {"messages": messages, "reward": reward, "done": self._flag(done), "metrics": numbers}

    def _flag(self, value: Any) -> bool:
        if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
            return bool(value)
        raise self._host.WrongAnswer(f"done is {value!r}, neither True nor False")
