"""An agent of a few lines, in the process, that asks for several turns at once, in any order."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, field

from aligner.data.prompts import Prompt
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample
from tests.rollout.episodes.scripted import digest, reply

BRANCHES, LENGTH = 3, 2
Place = tuple[int, int]
"""(branch, turn in it); branch 0 is the first turn, branch BRANCHES + 1 the last one."""


@dataclass
class Play:
    """An episode."""

    task: Prompt
    seed: int
    ready: list[Place] = field(default_factory=lambda: [(0, 1)])
    """Turns that may be asked for."""
    asked: dict[int, Place] = field(default_factory=dict)
    """Number of a turn -> its place."""
    over: dict[Place, list[int]] = field(default_factory=dict)
    """Place -> all ids of its segment."""
    sampled: dict[Place, list[int]] = field(default_factory=dict)


class Forked:
    """A first turn; then BRANCHES conversations of LENGTH turns that go on from it, all at once; a last turn once all are over.

    Whatever the order in which turns are asked for, the row has them by their places.
    """

    def __init__(self, order: int) -> None:
        """Args:
        order: a seed that draws in which order, and how late, turns are asked for.
        """
        self.order, self.plays = random.Random(order), dict[int, Play]()
        self.together = 0
        """Most turns of one episode that were open at once."""

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        self.plays[episode] = Play(task, seed)

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        events: list[Ask | Ended] = []
        for episode, play in list(self.plays.items()):
            if (BRANCHES + 1, 1) in play.over:
                events.append(self._ended(episode))
                continue
            self.order.shuffle(play.ready)
            for _ in range(self.order.randint(0, len(play.ready))):
                events.append(self._ask(episode, play, play.ready.pop()))
            self.together = max(self.together, len(play.asked) - len(play.over))
        return events

    def _ask(self, episode: int, play: Play, place: Place) -> Ask:
        branch, turn = place
        base = None if branch == 0 else (0, 1) if turn == 1 else (branch, turn - 1)
        known = [] if base is None else play.over[base]
        new = list(play.task.tokens) if base is None else reply(play.seed, digest(place) % 1000, known)
        if branch > BRANCHES:
            new = [*new, *(play.sampled[one][0] for one in sorted(play.sampled))]
        number = len(play.asked) + 1
        play.asked[number] = place
        follows = number > 1 and base == play.asked[number - 1]
        return Ask(episode, number, (*known, *new), not follows, 6, seed_key=digest(place) % 2**40)

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        play = self.plays[episode]
        branch, number = place = play.asked[turn]
        play.over[place], play.sampled[place] = [*sample.prompt, *sample.tokens], sample.tokens
        if branch == 0:
            play.ready += [(other, 1) for other in range(1, BRANCHES + 1)]
        elif number < LENGTH:
            play.ready.append((branch, number + 1))
        elif len(play.over) == 1 + BRANCHES * LENGTH:
            play.ready.append((BRANCHES + 1, 1))

    def _ended(self, episode: int) -> Ended:
        play = self.plays.pop(episode)
        order = sorted(play.asked, key=lambda number: play.asked[number])
        rewards = tuple(len(play.sampled[play.asked[number]]) / 8 for number in order)
        return Ended(episode, math.fsum(rewards), rewards, "done", {"detail": ""}, tuple(order))

    def pause(self, episode: int) -> None:
        """It takes no place."""

    def abandon(self, episodes: Collection[int]) -> None:
        for episode in episodes:
            self.plays.pop(episode, None)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is open."""
