"""An environment of a few lines, in the process: what it says and pays is a function of what was sampled and of its seed."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from aligner.data.prompts import Prompt
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample

VOCAB = 96


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def reply(seed: int, turn: int, tokens: list[int], vocab: int = VOCAB) -> list[int]:
    """Ids that the environment says after a turn: 1 to 5 of them."""
    value = digest(seed, turn, tokens)
    return [3 + digest(value, i) % (vocab - 3) for i in range(1 + value % 5)]


@dataclass
class Play:
    task: Prompt
    seed: int
    context: list[int]
    turn: int = 1
    rewards: list[float] = field(default_factory=list)
    due: float = 0.0
    event: Ask | Ended | None = None


class Scripted:
    """`turns(seed)` turns each; the reward of a turn is the share of even tokens in it.

    Every third turn begins a segment of its own, with the last ids of the one before, where `segments`.
    """

    def __init__(
        self,
        turns: int = 4,
        shuffle: int | None = None,
        delay_s: tuple[float, float] = (0.0, 0.0),
        segments: bool = False,
        max_tokens: int | None = None,
        vocab: int = VOCAB,
        places: int | None = None,
        most_turns: int | None = None,
    ) -> None:
        """Args:
        shuffle: what is ready comes in an order, and with waits, that this seed draws; None: at once, in order.
        most_turns: limit at which an episode ends as max_turns.
        places: episodes that are open at once and not paused; more wait until one ends or is paused.
        """
        self.most_turns = most_turns
        self.places, self.waiting, self.placed = places, list[int](), set[int]()
        self.vocab = vocab
        self.turns, self.segments, self.delay_s, self.max_tokens = turns, segments, delay_s, max_tokens
        self.order = None if shuffle is None else random.Random(shuffle)
        self.plays: dict[int, Play] = {}
        self.answers = self.polls = 0
        self.closed = False
        self.fail_at: tuple[str, int] | None = None
        """("poll" or "answer", at which call of it)."""

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        self.plays[episode] = Play(task, seed, list(task.tokens))
        self.waiting.append(episode)
        self._place()

    def _place(self) -> None:
        while self.waiting and (self.places is None or len(self.placed) < self.places):
            episode = self.waiting.pop(0)
            self.placed.add(episode)
            self._say(episode, Ask(episode, 1, tuple(self.plays[episode].context), True, self.max_tokens))

    def _leave(self, episode: int) -> None:
        self.placed.discard(episode)
        self._place()

    def _say(self, episode: int, event: Ask | Ended) -> None:
        play = self.plays[episode]
        low, high = self.delay_s
        play.event, play.due = event, time.monotonic() + (self.order or random).uniform(low, high) if high else 0.0

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        self.polls += 1
        if self.fail_at == ("poll", self.polls):
            raise OSError("the environment's machine is gone")
        now = time.monotonic()
        ready = [play for play in self.plays.values() if play.event is not None and play.due <= now]
        assert self.polls < 10000 or self.places is None, "nobody can go on"
        waiting = [play.due for play in self.plays.values() if play.event is not None]
        if not ready and waiting and wait_s:
            time.sleep(max(0.0, min(wait_s, min(waiting) - now)))
            return self.poll(0.0)
        if self.order is not None:
            self.order.shuffle(ready)
            ready = ready[: self.order.randint(0, len(ready))]
        events = []
        for play in ready:
            assert play.event is not None
            events.append(play.event)
            play.event = None
        for event in events:
            if isinstance(event, Ended):
                del self.plays[event.episode]
                self._leave(event.episode)
        return events

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        self.answers += 1
        if self.fail_at == ("answer", self.answers):
            raise OSError("the environment's machine is gone")
        play = self.plays[episode]
        self.placed.add(episode)
        assert (turn, sample.prompt, sample.ended) == (play.turn, play.context, True)
        play.rewards.append(sum(token % 2 == 0 for token in sample.tokens) / len(sample.tokens))
        last = self.turns - digest(play.seed, "turns", play.task.tokens) % 2
        if turn == self.most_turns:
            self._say(episode, Ended(episode, sum(play.rewards), tuple(play.rewards), "max_turns", {"detail": ""}))
            return
        if turn >= last:
            kind = "crashed" if digest(play.seed, sample.tokens) % 7 == 0 else "done"
            reward = math.nan if kind == "crashed" else sum(play.rewards)
            self._say(episode, Ended(episode, reward, tuple(play.rewards), kind, {"detail": f"after {turn}"}))
            return
        play.turn += 1
        said = reply(play.seed, turn, sample.tokens, self.vocab)
        new = self.segments and play.turn % 3 == 0
        play.context = [*(sample.tokens[-2:] if new else [*play.context, *sample.tokens]), *said]
        self._say(episode, Ask(episode, play.turn, tuple(play.context), new, self.max_tokens))

    def pause(self, episode: int) -> None:
        assert self.plays[episode].event is None, "it has not been told what it asked for"
        self._leave(episode)

    def abandon(self, episodes: Collection[int]) -> None:
        for episode in episodes:
            if self.plays.pop(episode, None) is not None:
                self.waiting = [one for one in self.waiting if one != episode]
                self._leave(episode)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed = True
