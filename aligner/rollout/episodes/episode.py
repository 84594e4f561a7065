"""One episode as far as it has been played: its turns, exactly as they were sampled, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aligner.data.prompts import Prompt
from aligner.rollout.config import Sampling
from aligner.rollout.episodes.source import Ended
from aligner.rollout.kind import Place
from aligner.rollout.requests import Sample
from aligner.rollout.rows import sample_from, sample_to


@dataclass(frozen=True)
class Turn:
    """One generation by the policy: what it was asked, and what it has sampled so far."""

    added: tuple[int, ...]
    """Token ids before it that were not sampled: what follows the turn before, or the whole context of a new segment."""
    new_segment: bool
    """Its context begins a segment of its own; else it goes on from that of the turn before."""
    sample: Sample
    """What was sampled. `prompt` is the whole context while the turn is under way, and empty afterwards."""
    max_tokens: int | None = None
    """Most tokens, where the agent said so."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Settings of sampling that the agent asked for."""
    alone: bool = True
    """No other turn of the episode was open when it was asked for."""


@dataclass(frozen=True)
class Episode:
    """A row of several turns."""

    task: Prompt
    place: Place
    """Its place in the run: the seeds of its turns and of its environment."""
    turns: tuple[Turn, ...] = ()
    """In the order in which they were asked for, and some may be interrupted; once it has ended: those that are over, in the order of
    its row."""
    end: Ended | None = None
    key: int | None = field(default=None, compare=False)
    """Its key where it is being played; None: nowhere yet, or in another process."""

    @property
    def ended(self) -> bool:
        """Nothing more is to be played."""
        return self.end is not None

    @property
    def row_tokens(self) -> int:
        """Tokens of its row, all segments together."""
        if not self.turns:
            return len(self.task.tokens)
        return sum(len(turn.added) + len(turn.sample.tokens) for turn in self.turns)

    @property
    def token_sum(self) -> int:
        """Sum of the sampled token ids."""
        return sum(turn.sample.token_sum for turn in self.turns)


def contexts(turns: Sequence[Turn]) -> list[list[int]]:
    """The whole context of each turn, in the order in which they were asked for."""
    found: list[list[int]] = []
    known: list[int] = []
    for turn in turns:
        context = [*(() if turn.new_segment else known), *turn.added]
        found.append(context)
        known = [*context, *turn.sample.tokens]
    return found


def in_order(turns: Sequence[Turn], order: Sequence[int]) -> tuple[Turn, ...]:
    """Some turns in another order; one that goes on from the turn before it there stands in the segment of that.

    Args:
        turns: all of an episode, in the order in which they were asked for.
        order: numbers, from 1, of those that are wanted.
    """
    whole, ordered = contexts(turns), []
    known: list[int] = []
    for number in order:
        turn, context = turns[number - 1], whole[number - 1]
        new = not known or context[: len(known)] != known
        ordered.append(replace(turn, added=tuple(context if new else context[len(known) :]), new_segment=new))
        known = [*context, *turn.sample.tokens]
    return tuple(ordered)


def turn_sampling(run: Sampling, turn: Turn, stop: Sequence[int], room: int) -> Sampling:
    """How a turn is sampled: by the run's settings, with the agent's own limit and stop tokens.

    Args:
        stop: tokens that end a response where the run names none.
        room: tokens that fit in the engine after the turn's context.
    """
    most = run.max_tokens if turn.max_tokens is None else min(run.max_tokens, turn.max_tokens)
    ends = run.stop_token_ids
    if turn.sampling.get("stop_token_ids"):
        ends = tuple(dict.fromkeys([*(stop if ends is None else ends), *turn.sampling["stop_token_ids"]]))
    return replace(run, stop_token_ids=ends, max_tokens=min(most, room))


def episode_to(episode: Episode) -> dict[str, Any]:
    """As JSON, without its task."""
    return {
        "place": vars(episode.place),
        "turns": [
            {
                **{name: value for name, value in vars(turn).items() if name != "sample"},
                "sampling": dict(turn.sampling),
                "sample": {**sample_to(turn.sample), "prompt": []},  # the context is that of the turns before
            }
            for turn in episode.turns
        ],
        "end": None if episode.end is None else _end_to(episode.end),
    }


def episode_from(saved: Mapping[str, Any], task: Prompt) -> Episode:
    """Inverse of `episode_to`."""
    turns = [
        Turn(**{**turn, "added": tuple(turn["added"]), "sample": sample_from(turn["sample"])})
        for turn in saved["turns"]
    ]
    end = None if saved["end"] is None else _end_from(saved["end"])
    return Episode(task, Place(**saved["place"]), tuple(turns), end)


def _end_to(end: Ended) -> dict[str, Any]:
    """Without the key, which counts the episodes of a process, and the order, in which its turns are already: two runs that are the same save the same."""
    values = {name: value for name, value in vars(end).items() if name not in ("episode", "order")}
    return {**values, "reward": None if math.isnan(end.reward) else end.reward, "record": dict(end.record)}


def _end_from(saved: Mapping[str, Any]) -> Ended:
    reward = math.nan if saved["reward"] is None else saved["reward"]
    return Ended(**{**saved, "episode": 0, "reward": reward, "turn_rewards": tuple(saved["turn_rewards"])})
