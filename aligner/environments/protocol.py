"""What the policy and an environment say to each other: actions, turns, and how an episode's calls end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FAILURES = ("timeout", "episode_timeout", "crashed", "memory", "protocol", "error", "collateral", "replay")
"""Kinds of failure of an episode, see `Failed`."""


@dataclass(frozen=True)
class Action:
    """What the policy said in one turn."""

    text: str
    """The response as text, without special tokens; with tool calls: as the tool parser left it, or the whole response."""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """Parsed calls, in order: {"name": str, "arguments": dict, ...}; further keys (an id) come back in the result's message
    as "tool_call_id"."""


@dataclass(frozen=True)
class Turn:
    """What the environment says after a reset or an action."""

    messages: Sequence[Mapping[str, Any]]
    """New messages: {"role": "user", "tool" or "system", "content": str, ...}; a result has its tool's "name"."""
    done: bool = False
    """The episode has ended; the environment takes no further action."""
    reward: float | None = None
    """Reward for the action; None where the environment gives none for this turn."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to report: the environment's own, and those of the worker (`tool_calls`, `tool_errors`, `cut_messages`)."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """At reset only: the JSON schemas of its tools, as chat templates take them ({"type": "function", "function": ...})."""
    replaces: bool = False
    """At reset only: the messages stand in place of the row's own; False: they follow them."""


@dataclass(frozen=True)
class Opened:
    """The environment of an episode was reset."""

    episode: int
    turn: Turn


@dataclass(frozen=True)
class Stepped:
    """The environment has answered an action."""

    episode: int
    turn: Turn


@dataclass(frozen=True)
class Finished:
    """The final reward of an episode, after which it is closed."""

    episode: int
    reward: float | None
    """Final reward, on top of those of the turns; None where the environment gives none."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """An episode has failed and is closed: it is left out of training, never scored 0."""

    episode: int
    kind: str
    """One of FAILURES. timeout: a reset, step or final reward took longer than environment.step_timeout_s. episode_timeout:
    all of them together, longer than environment.episode_timeout_s. crashed: its process ended. memory: it needed more
    than environment.memory_mib. protocol: it answered with something else than was agreed (wrong type, NaN, not UTF-8, too
    long). error: it raised. collateral: its process was lost to another episode (`environment.replay=false`).
    replay: it went on in a new process, but there the environment answered its actions differently."""
    detail: str
    """What happened, for people: the exception or the end of the process's log."""


PoolEvent = Opened | Stepped | Finished | Failed
