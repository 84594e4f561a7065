"""`Episodes`: plays episodes on one replica. The source on its first rank asks for turns; all of its ranks sample them in lockstep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aligner.bounds import check_settings
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.episodes.episode import (
    Episode,
    Turn,
    contexts,
    episode_from,
    episode_to,
    in_order,
    turn_sampling,
)
from aligner.rollout.episodes.figures import Figures
from aligner.rollout.episodes.rows import LIMITS, episode_samples
from aligner.rollout.episodes.source import Ask, Ended, EpisodeSource
from aligner.rollout.kind import Place, RolloutKind
from aligner.rollout.requests import Sample

WAIT_S = 0.05
"""Longest wait for the source where the engine has nothing to do: then `enough` is asked again, and progress is reported."""


@dataclass(frozen=True)
class _TurnRequest:
    """An `Ask` as it is broadcast within the replica: with those ids alone that the other ranks lack."""

    episode: int
    turn: Turn


@dataclass(frozen=True)
class _Broadcast:
    """What the replica's first rank broadcasts before an engine step."""

    events: Sequence[_TurnRequest | Ended] = ()
    stop: bool = False
    """It is enough."""
    error: str = ""
    """The source has failed."""


@dataclass(eq=False)
class _Playing:
    """An episode in play."""

    episode: Episode
    """Without its turns until it has ended."""
    sampling: Sampling
    tokens_left: int | None
    """Tokens that may be sampled before it is interrupted; of turns that are open at once each may have them."""
    recorded: dict[int, Turn] = field(default_factory=dict)
    """Turns of a checkpoint that it has not reached again, with their contexts, by their seeds."""
    in_turn: bool = True
    """Of those no two were open at once."""
    turns: list[Turn] = field(default_factory=list)
    """In the order in which they were asked for; one that is over has no context of its own any more."""
    asked: int = 0
    """How many the source has asked for (first rank): those of the next broadcast too."""
    context: list[int] = field(default_factory=list)
    """Ids of the last turn's segment, where that turn is over."""
    tickets: dict[int, int] = field(default_factory=dict)
    """Number of a turn that is being sampled -> the engine's ticket."""
    interrupted: bool = False
    """No more tokens may be sampled for now."""
    waiting_since: float = 0.0
    """When its environment began to work on it (first rank)."""

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.episode.ended or (self.interrupted and not self.tickets)

    @property
    def open(self) -> list[int]:
        """Numbers of the turns that are not over: being sampled, or waiting for the next step."""
        return [number for number, turn in enumerate(self.turns, 1) if not turn.sample.ended]

    @property
    def so_far(self) -> Episode:
        """With its turns: the interrupted ones, and those of a checkpoint that it has not reached again, too."""
        if self.episode.ended:
            return self.episode
        recorded = [replace(turn, added=tuple(turn.sample.prompt), new_segment=True) for turn in self.recorded.values()]
        return replace(self.episode, turns=(*self.turns, *recorded))


class Episodes(RolloutKind[Episode]):
    """The episodes of one replica.

    Before each engine step the first rank takes what has become ready from the source and tells the other ranks, so that
    all of them make equal requests; with one rank there is nothing to send. Episodes whose environments are at work hold
    nobody up. What is sampled depends on an episode's place in the run alone: the seed of a turn is that of (run, call, task,
    sample, turn), so the order in which environments answer has no part in it, but for rounding (see `RolloutEngine`).

    Turns of one episode that are open at once (an agent that sends several requests) are sampled together.

    An episode of a checkpoint is played again from its start in a new environment, which is given the turns that were recorded;
    where it asks for another context than it did, or ends sooner, the episode fails as "replay". A turn is known again by its
    seed, which says its place in the episode.
    """

    def __init__(self, engine: RolloutEngine, source: EpisodeSource | None, progress: Callable[[], None]) -> None:
        """Args:
        source: on the replica's first rank; None on the others.
        progress: called while only environments are at work.
        """
        self._engine, self._source, self._progress = engine, source, progress
        self._playing: dict[int, _Playing] = {}
        self._ended_between: dict[int, _Playing] = {}
        """Episodes that have ended while they were interrupted: the next `resume` of them gives their end."""
        self._tickets: dict[int, list[_Playing]] = {}
        self._begun = self._started = 0
        self._error: Exception | None = None
        """Raised by the source on this rank; all ranks hear of it before the next engine step."""
        self.figures = Figures()
        """What the replica has spent its time on (first rank)."""

    # ---- a kind of rollout

    def begin(self, prompt: Prompt, place: Place) -> Episode:
        """Nothing is played."""
        return Episode(prompt, place)

    def check(self, rollouts: Sequence[Episode], sampling: Sampling) -> None:
        """Contexts are checked as they come."""
        check_settings(sampling, "sampling")

    def resume(self, rollouts: Sequence[Episode], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Begin episodes, or let interrupted ones go on. Their environments begin to work at once. One that has ended since it was
        interrupted (its environment failed, or its program needed the open turns no more) is not played again."""
        self._engine.loaded.check()
        playing = []
        for episode in rollouts:
            assert not episode.ended, "an episode that has ended cannot go on"
            one = self._in_play(episode) or self._begin(episode)
            one.sampling, one.tokens_left, one.interrupted = sampling, step_tokens, False
            playing.append(one)
        with self._engine.working():
            for one in playing:
                for number in one.open:
                    self._submit(one, number)
        return self._ticket(playing)

    def finish(self, ticket: int) -> list[Episode]:
        """Play until the episodes of one `resume` have ended or are interrupted; in its order."""
        playing = self._tickets[ticket]
        while not all(one.settled for one in playing):
            self._step(_never)
        episodes = [one.so_far for one in self._tickets.pop(ticket)]
        for episode in episodes:
            if episode.ended and episode.key is not None:
                self._ended_between.pop(episode.key, None)
        return episodes

    def hold(self, rollouts: Sequence[Episode]) -> int:
        """Episodes that have ended."""
        return self._ticket([_Playing(episode, Sampling(), None) for episode in rollouts])

    def held(self, ticket: int) -> list[Episode]:
        """The episodes of one `resume` or `hold`."""
        return [one.so_far for one in self._tickets[ticket]]

    def work_until(self, enough: Callable[[], bool]) -> None:
        """Play, and generate whatever else is in the engine, until `enough()` or until nothing is left."""
        while self._engine.requests.under_way or not all(one.settled for one in self._playing.values()):
            if self._step(enough):
                return

    def samples(self, prompts: Sequence[Prompt], rollouts: Sequence[Episode]) -> Samples:
        """See `episode_samples`."""
        return episode_samples(rollouts)

    def to_json(self, rollout: Episode) -> dict[str, Any]:
        """With its turns so far."""
        return episode_to(rollout)

    def from_json(self, saved: Mapping[str, Any], prompt: Prompt) -> Episode:
        """Inverse of `to_json`."""
        return episode_from(saved, prompt)

    def take_figures(self) -> Figures:
        """What the replica has spent its time on since the last time; on its first rank."""
        taken, self.figures = self.figures, Figures()
        if self._source is not None:
            taken.source = self._source.metrics()
        return taken

    def report(self) -> list[str]:
        """For a fault report: the episodes that have been with their environments the longest; asked by another thread."""
        now = time.time() - time.monotonic()
        waiting = [one for one in list(self._playing.values()) if not one.open and not one.settled]
        return [
            f"{len(waiting)} episodes are with their environments; number {one.episode.key}, of task {one.episode.task.index}, since "
            f"{time.strftime('%H:%M:%S', time.localtime(now + one.waiting_since))}, after turn {len(one.turns)}"
            for one in sorted(waiting, key=lambda one: one.waiting_since)[:3]
        ]

    def close(self) -> None:
        """End environments and programs."""
        if self._source is not None:
            self._source.close()

    # ---- one engine step

    def _step(self, enough: Callable[[], bool]) -> bool:
        """What the source has, and an engine step, if there is anything to sample. Returns whether it is enough."""
        began = time.monotonic()
        idle = not self._engine.requests.under_way
        broadcast = (
            self._engine.from_first(self._poll_source(enough, WAIT_S if idle else 0.0) if self._source else None)
            or _Broadcast()
        )
        if broadcast.error:
            if self._error is not None:
                raise self._error
            raise RuntimeError(f"{broadcast.error}; the first rank of this rollout replica says more.")
        if broadcast.stop:
            return True
        asked = [turn for event in broadcast.events if (turn := self._apply(event)) is not None]
        waited = time.monotonic()
        with self._engine.working():
            for one, number in asked:
                self._submit(one, number)
            if self._engine.requests.under_way:
                self._engine.requests.advance()
            else:
                self._progress()
            over = [
                (one, number)
                for one in self._playing.values()
                for number, ticket in one.tickets.items()
                if self._engine.requests.ended(ticket)
            ]
        for one, number in over:
            self._collect(one, number)
        if idle:
            self.figures.idle_s += waited - began
        self.figures.total_s += time.monotonic() - began
        return False

    def _poll_source(self, enough: Callable[[], bool], wait_s: float) -> _Broadcast | None:
        """On the first rank; None: nothing has become ready."""
        assert self._source is not None
        try:
            if self._error is not None:
                raise self._error
            if enough():
                return _Broadcast(stop=True)
            events = [known for event in self._source.poll(wait_s) if (known := self._to_broadcast(event)) is not None]
        except Exception as error:
            self._error = error
            return _Broadcast(error=f"episodes cannot go on: {type(error).__name__}: {error}")
        return _Broadcast(events) if events else None

    def _to_broadcast(self, event: Ask | Ended) -> _TurnRequest | Ended | None:
        """What the other ranks need of an event; None: it is of an episode that was given up."""
        one = self._playing.get(event.episode)
        if one is None:
            return None
        # of several turns that are asked for together the first counts
        if not one.open and one.asked == len(one.turns):
            self.figures.worked(one.waiting_since)
        if isinstance(event, Ended):
            return event
        one.asked += 1
        number, known = one.asked, len(one.context)
        if event.turn != number:
            raise RuntimeError(f"episode {event.episode} asks for turn {event.turn} where turn {number} is next.")
        new = event.new_segment or number == 1
        follows = number == len(one.turns) + 1 and number - 1 not in one.open
        if not new and not (follows and list(event.context[:known]) == one.context):
            raise RuntimeError(
                f"turn {number} of episode {event.episode} does not begin with the ids of its segment so far, and says that it does."
            )
        added = event.context if new else event.context[known:]
        sample = Sample([], one.episode.place.turn_seed(number, event.seed_key))
        return _TurnRequest(event.episode, Turn(added, new, sample, event.max_tokens, dict(event.sampling)))

    def _apply(self, event: _TurnRequest | Ended) -> tuple[_Playing, int] | None:
        """On every rank. Returns the turn (by its number) that is to be sampled, if there is one."""
        one = self._playing.get(event.episode)
        if one is None:
            return None
        if isinstance(event, Ended):
            # limits may be lower than before
            if one.recorded and not math.isnan(event.reward) and event.ended not in LIMITS:
                played = len(one.turns)
                before = played + len(one.recorded)
                detail = f"the environment ends the episode after turn {played}; before, it asked for turn {before}."
                self._fail(one, "replay", detail)
            else:
                self._end(one, event)
            return None
        number = len(one.turns) + 1
        context = [*(() if event.turn.new_segment else one.context), *event.turn.added]
        turn = replace(event.turn, sample=replace(event.turn.sample, prompt=context), alone=not one.open)
        if one.recorded:
            recorded = one.recorded.pop(turn.sample.seed, None)
            if one.in_turn if recorded is None else not _asked_alike(recorded, turn):
                self._fail(one, "replay", f"the environment asks for turn {number} with another context than before.")
                return None
            if recorded is not None:  # limits of the run may have been raised since
                turn = replace(
                    turn,
                    sample=recorded.sample,
                    max_tokens=recorded.max_tokens,
                    alone=turn.alone and recorded.alone,  # recorded turns are over at once, and none is open any more
                )
        one.turns.append(turn)
        if turn.sample.ended:
            self._end_turn(one, number, turn.sample)
            return None
        if self._room(turn) < 1:
            limit = self._engine.config.length(self._engine.spec)
            self._fail(one, "context", f"a context of {len(context)} tokens leaves no room in {limit}.")
            return None
        return one, number

    def _room(self, turn: Turn) -> int:
        """Tokens that fit in the engine after the turn's context."""
        return self._engine.config.length(self._engine.spec) - len(turn.sample.prompt)

    def _submit(self, one: _Playing, number: int) -> None:
        """Hand a turn to the engine, or keep it for the next step."""
        if one.episode.ended:
            return
        turn = one.turns[number - 1]
        if one.interrupted or one.tokens_left == 0:
            self._interrupt(one)
            return
        sampling = turn_sampling(one.sampling, turn, self._engine.requests.stop, self._room(turn))
        one.tickets[number] = self._engine.requests.start([turn.sample], sampling, one.tokens_left)

    def _collect(self, one: _Playing, number: int) -> None:
        """A turn has left the engine: it is over, or interrupted."""
        (sample,) = self._engine.requests.finish(one.tickets.pop(number))
        turn = one.turns[number - 1]
        if one.tokens_left is not None:
            one.tokens_left = max(0, one.tokens_left - len(sample.tokens) + len(turn.sample.tokens))
        if sample.ended:
            self._end_turn(one, number, sample)
        else:
            one.turns[number - 1] = replace(turn, sample=sample)
            self._interrupt(one)

    def _interrupt(self, one: _Playing) -> None:
        """Let it go on in a later step."""
        one.interrupted = True
        self._pause(one)

    def _pause(self, one: _Playing) -> None:
        """The round's other episodes must not wait for the place of one that goes on in a later step."""
        assert one.episode.key is not None
        if self._source is not None and not one.tickets:
            self._call_source(self._source.pause, one.episode.key)

    def _end_turn(self, one: _Playing, number: int, sample: Sample) -> None:
        """A turn has been sampled to its end; its environment goes on."""
        assert one.episode.key is not None
        one.turns[number - 1] = replace(one.turns[number - 1], sample=replace(sample, prompt=[]))
        if number == len(one.turns):
            one.context = [*sample.prompt, *sample.tokens]
        one.waiting_since = time.monotonic()
        if self._source is not None:
            self._call_source(self._source.answer, one.episode.key, number, sample)
        if one.interrupted:
            self._pause(one)

    # ---- begin and end

    def _in_play(self, episode: Episode) -> _Playing | None:
        """Where it goes on or has ended in this process."""
        key = -1 if episode.key is None else episode.key
        return self._playing.get(key) or self._ended_between.get(key)

    def _begin(self, episode: Episode) -> _Playing:
        self._begun += 1
        fresh = replace(episode, key=self._begun, turns=())
        whole = zip(episode.turns, contexts(episode.turns), strict=True)
        recorded = [replace(turn, sample=replace(turn.sample, prompt=context)) for turn, context in whole]
        one = _Playing(fresh, Sampling(), None, waiting_since=time.monotonic())
        one.recorded = {turn.sample.seed: turn for turn in recorded}
        one.in_turn = all(turn.alone for turn in recorded)
        self._playing[self._begun] = one
        if self._source is not None:
            self._call_source(self._source.start, self._begun, episode.task, episode.place.environment_seed)
        return one

    def _fail(self, one: _Playing, kind: str, detail: str) -> None:
        """End an episode that cannot go on."""
        key, turns = one.episode.key, len(one.turns) - len(one.open)
        assert key is not None
        if self._source is not None:
            self._call_source(self._source.abandon, [key])
        self._end(one, Ended(key, math.nan, (0.0,) * turns, kind, {"detail": detail}))

    def _end(self, one: _Playing, end: Ended) -> None:
        over = [number for number, turn in enumerate(one.turns, 1) if turn.sample.ended]
        turns, order = len(over), list(end.order) or over
        if sorted(order) != over:
            raise RuntimeError(f"episode {end.episode} has ended with the turns {order} in its row; {over} are over.")
        if len(end.turn_rewards) > turns or (len(end.turn_rewards) < turns and not math.isnan(end.reward)):
            raise RuntimeError(
                f"episode {end.episode} has ended as {end.ended} with {len(end.turn_rewards)} rewards for {turns} turns."
            )
        with self._engine.working():
            for ticket in one.tickets.values():
                self._engine.requests.cancel(ticket)
        rewards = (*end.turn_rewards, *[0.0] * (turns - len(end.turn_rewards)))
        one.tickets.clear()
        ended = replace(end, turn_rewards=rewards, order=())
        asked_in_order = order == list(range(1, turns + 1))  # and none is missing between them
        turns_in_row = tuple(one.turns[:turns]) if asked_in_order else in_order(one.turns, order)
        one.episode = replace(one.episode, turns=turns_in_row, end=ended)
        del self._playing[end.episode]
        if one.interrupted:
            self._ended_between[end.episode] = one

    def _call_source(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call the source; its error is raised once the other ranks know of it, before the next engine step."""
        if self._error is None:
            try:
                method(*arguments)
            except Exception as error:
                self._error = error

    def _ticket(self, playing: list[_Playing]) -> int:
        self._started += 1
        self._tickets[self._started] = playing
        return self._started


def _asked_alike(turn: Turn, other: Turn) -> bool:
    """Whether both were asked for with the same context and the same settings of sampling."""
    return (turn.sample.prompt, dict(turn.sampling)) == (other.sample.prompt, dict(other.sampling))


def _never() -> bool:
    return False
