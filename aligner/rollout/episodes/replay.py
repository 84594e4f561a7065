"""Play a saved episode again: a fresh environment gets the recorded turns in place of sampled ones, and what differs is reported."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from aligner.data.prompts import Prompt
from aligner.report.sample_records import RecordedTurn, SampleRecord
from aligner.rollout.episodes.source import Ask, Ended, EpisodeSource
from aligner.rollout.requests import Sample

OF_THE_ROLLOUT = ("context", "replay")
"""Endings that the rollout made, not the environment: it would have gone on."""


@dataclass(frozen=True)
class Difference:
    """One thing that the environment did not do again."""

    where: str
    """"turn 2" or "end"."""
    what: str
    recorded: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: recorded {self.recorded!r}, now {self.now!r}"


def replay(source: EpisodeSource, record: SampleRecord, stop: Collection[int], wait_s: float) -> list[Difference]:
    """Play a recorded episode in a fresh environment; nothing is sampled.

    It goes on as long as turns are asked for with recorded contexts, those that are open at once in any order: after another
    context, what was sampled means nothing.

    Args:
        stop: token ids that end any turn; a recorded turn without one at its end, or one that the agent asked for, was cut
            off by its limit.
        wait_s: most seconds for one answer of the environment.

    Returns:
        What differs; nothing if the environment did it all again.

    Raises:
        ValueError: the record is no episode, or nothing came from the environment for `wait_s`.
    """
    if record.episode is None:
        raise ValueError(
            f"row {record.row} is a response, not an episode: there is no environment to play it again in."
        )
    first = tuple(record.tokens[: record.prompt_tokens])
    task = Prompt(first, str(record.fields.get("prompt", "")), record.task, record.prompt_index)
    source.start(1, task, record.episode["seed"])
    left = [(turn, record.tokens[record.segment_of(turn.start) : turn.start]) for turn in record.turns]
    while left or record.episode["ended"] not in OF_THE_ROLLOUT:
        where = f"turn {left[0][0].number}" if left else "end"
        events = _next_events(source, wait_s)
        ended = next((event for event in events if isinstance(event, Ended)), None)  # it may have failed since it asked
        if ended is not None:
            early = [Difference(where, "the episode has ended", "a turn", _ending(ended))]
            return early if left else _differing_ends(record, ended)
        for ask in (event for event in events if isinstance(event, Ask)):
            known = next((one for one in left if one[1] == list(ask.context)), None)
            if known is None:
                source.abandon([1])
                if not left:
                    return [Difference(where, "another turn is asked for", record.episode["ended"], f"turn {ask.turn}")]
                return [Difference(f"turn {left[0][0].number}", "the context", left[0][1], list(ask.context))]
            left.remove(known)
            ends = {*stop, *ask.sampling.get("stop_token_ids", ())}
            source.answer(1, ask.turn, _sampled(record, *known, ends))
    source.abandon([1])
    return []


def _next_events(source: EpisodeSource, wait_s: float) -> list[Ask | Ended]:
    until = time.monotonic() + wait_s
    while True:
        events = source.poll(min(1.0, wait_s))
        if events:
            return events
        if time.monotonic() >= until:
            source.abandon([1])
            raise ValueError(f"the environment has said nothing for {wait_s:g} s; give it longer with --wait.")


def _sampled(record: SampleRecord, turn: RecordedTurn, context: list[int], stop: Collection[int]) -> Sample:
    tokens = record.tokens[turn.start : turn.stop]
    logp = [math.nan if value is None else value for value in turn.logp]
    return Sample(context, 0, tokens, logp, turn.versions, ended=True, truncated=tokens[-1] not in stop)


def _differing_ends(record: SampleRecord, end: Ended) -> list[Difference]:
    assert record.episode is not None
    pairs: list[tuple[str, Any, Any]] = [("how it ended", record.episode["ended"], end.ended)]
    if record.episode_reward is not None:  # of a failed episode no reward is kept
        rewards = [turn.reward for turn in record.turns]
        pairs.append(("the turns' rewards", rewards, [_as_saved(reward) for reward in end.turn_rewards]))
        pairs.append(("the reward", record.episode_reward, _as_saved(end.reward)))
    return [Difference("end", what, recorded, now) for what, recorded, now in pairs if recorded != now]


def _as_saved(value: float) -> float | None:
    """Rewards are kept in float32; null where they are not finite."""
    return _float32(value) if math.isfinite(value) else None


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _ending(end: Ended) -> str:
    detail = end.record.get("detail")
    return f"{end.ended} ({detail})" if detail else end.ended
