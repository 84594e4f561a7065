"""Play episodes of fixed texts through a pool, as a driver would."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aligner.environments.config import EnvironmentConfig
from aligner.environments.pool import Action, EnvironmentPool, Failed, Finished, Opened, PoolEvent, Stepped

ROGUES = Path(__file__).with_name("rogues.py")
LIMIT_S = 300.0
"""After which no event is awaited any more, however slow the machine is."""


@contextmanager
def pool(**settings: Any) -> Iterator[EnvironmentPool]:
    """A pool with few processes and short limits."""
    usual = {"target": f"{ROGUES}:Rogue", "processes": 1, "step_timeout_s": 20.0}
    made = EnvironmentPool(EnvironmentConfig(**{**usual, **settings}))
    try:
        yield made
    finally:
        made.close()


def play(
    made: EnvironmentPool, texts: Mapping[int, Sequence[str]], rows: Mapping[int, dict[str, Any]] | None = None
) -> dict[int, list[PoolEvent]]:
    """Open an episode for each number, say its texts one after the other, then finish; its events by number."""
    events: dict[int, list[PoolEvent]] = {number: [] for number in texts}
    for number in texts:
        made.open(number, (rows or {}).get(number, {"q": number}), seed=number)
    deadline, left = time.monotonic() + LIMIT_S, set(texts)
    while left:
        assert time.monotonic() < deadline, f"no event any more for {left}: {events}"
        for event in made.poll(1.0):
            events[event.episode].append(event)
            said = len(events[event.episode]) - 1
            if isinstance(event, Finished | Failed):
                left.remove(event.episode)
            elif said < len(texts[event.episode]) and not event.turn.done:
                made.step(event.episode, Action(texts[event.episode][said]))
            else:
                made.finish(event.episode)
    return events


def contents(events: Sequence[PoolEvent]) -> list[str]:
    """What the environment has said."""
    turns = [event.turn for event in events if isinstance(event, Opened | Stepped)]
    return [message["content"] for turn in turns for message in turn.messages]


def failure(events: Sequence[PoolEvent]) -> Failed:
    """The failure that ends an episode's events."""
    assert isinstance(events[-1], Failed), events
    return events[-1]
