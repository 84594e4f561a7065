"""Environments of kind `openenv`: a session with an OpenEnv server (package openenv), by its URL.

environment.options: `action`: the field of the server's action that gets the policy's text ("message"); `fields`: further fields of
each action; `observation`: the field of its observation that is shown (null: its text where it has one such field, else all of
it as JSON); `reset`: arguments of reset, before the row's `reset`. A server that lists tools (an MCP environment) is called by the
policy's tool calls, and a turn without one ends the episode. The reward is that of the server for each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

TEXTS = ("message", "text", "content", "output", "result", "prompt")
"""Fields of observations that are shown alone where an observation has exactly one of them."""
NOT_SHOWN = ("done", "reward", "metadata")


def make(host: Host) -> Callable[[], OpenEnv]:
    """See the package."""
    client = host.load("openenv.core.generic_client:GenericEnvClient", "environment.kind=openenv; environment.target")
    known = {"action", "fields", "observation", "reset", "tools"}
    if set(host.options) - known:
        raise host.Unusable(
            f"environment.options of kind=openenv are {', '.join(sorted(known))}, not {sorted(set(host.options) - known)}"
        )
    return lambda: OpenEnv(host, client(base_url=host.target))


class OpenEnv:
    """One episode: one session."""

    def __init__(self, host: Host, client: Any) -> None:
        self._host, self._client, self._options = host, client, host.options
        self._has_tools = bool(self._options.get("tools", False))

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        self._host.resolve(self._client.connect())
        arguments = {**self._options.get("reset", {}), **(row.get("reset") or {})}
        turn = self._turn(self._host.resolve(self._client.reset(**{"seed": seed % 2**31, **arguments})))
        if self._has_tools:
            listed = self._observation({"type": "list_tools"}).get("tools", [])
            turn["tools"] = [{"type": "function", "function": _function(tool)} for tool in listed]
        return turn

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._has_tools:
            action = {**self._options.get("fields", {}), self._options.get("action", "message"): text}
            return self._turn(self._host.resolve(self._client.step(action)))
        messages, done, rewards = [], not tool_calls, []
        for call in tool_calls:
            action = {"type": "call_tool", "tool_name": call.get("name"), "arguments": call.get("arguments", {})}
            result = self._host.resolve(self._client.step(action))
            content = self._host.text_of(_tool_result(result.observation), "the server")
            messages.append({"role": "tool", "name": str(call.get("name")), "content": content})
            done |= bool(result.done)
            rewards += [] if result.reward is None else [result.reward]
        return {"messages": messages, "done": done, "reward": sum(rewards) if rewards else None}

    def finish(self) -> dict[str, Any]:
        return {"reward": None}

    def close(self) -> None:
        self._host.resolve(self._client.close())

    def _observation(self, action: dict[str, Any]) -> dict[str, Any]:
        observation = self._host.resolve(self._client.step(action)).observation
        return observation if isinstance(observation, dict) else {}

    def _turn(self, result: Any) -> dict[str, Any]:
        observation = result.observation
        field = self._options.get("observation")
        if field is not None:
            if field not in observation:
                raise self._host.WrongAnswer(f"the observation has no {field!r}; it has {', '.join(observation)}")
            shown = observation[field]
        else:
            shown = _shown(observation)
        return {"messages": self._host.messages(shown), "done": bool(result.done), "reward": result.reward}


def _shown(observation: Any) -> Any:
    """The text of an observation, else the JSON of its fields."""
    if not isinstance(observation, dict):
        return observation
    texts = [name for name in observation if isinstance(observation[name], str) and observation[name]]
    named = [name for name in texts if any(name.endswith(text) for text in TEXTS)]
    if len(named) == 1:
        return observation[named[0]]
    rest = {name: value for name, value in observation.items() if name not in NOT_SHOWN}
    return json.dumps(rest, ensure_ascii=False) if rest else None


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    schema = tool.get("input_schema") or tool.get("inputSchema") or {"type": "object", "properties": {}}
    return {"name": tool["name"], "description": tool.get("description") or "", "parameters": schema}


def _tool_result(observation: Any) -> Any:
    """The result, or the error, of a tool call's observation."""
    if not isinstance(observation, dict):
        return observation
    if observation.get("error"):
        return {"error": observation["error"]}
    result = observation.get("result", observation)
    return result.get("data", result) if isinstance(result, dict) else result
