"""Partial rollout: a step adds a bounded number of tokens to each response; what has not ended goes on in the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.data.prompts import Prompt
from aligner.rollout.requests import Sample
from aligner.rollout.rows import as_samples, request_seed
from aligner.spmd.partition import partition
from aligner.spmd.ref import Ref, Rows

if TYPE_CHECKING:
    from aligner.rollout.role import Rollout


def batches(rollout: Rollout, prompts: Iterable[Sequence[Prompt]], num_samples: int, lag: int) -> Iterator[Ref]:
    """Batches of as many complete groups as there were prompts in the last batch, in the order in which they completed.

    A round takes one more batch of prompts and adds at most `stream.step_tokens` tokens to each response under way, new
    or carried over. A step takes the groups that have been complete for longest, after as many rounds as it needs to
    have enough. A group stays on its replica, and draws the tokens that it would have drawn without interruptions, if
    the weights stayed the same. What is under way never exceeds ceil(max_tokens / step_tokens) + lag batches.
    `lag` rounds are started ahead.
    """
    pool = _Pool(rollout, num_samples)
    rounds: deque[_Round] = deque()
    wanted = 0
    for batch in prompts:
        wanted = len(batch)
        rounds.append(pool.start(batch))
        if len(rounds) > lag:
            pool.finish(rounds.popleft())
        while pool.complete >= wanted:
            yield pool.take(wanted)
    while rounds or pool.carried:  # the prompts have an end
        if not rounds:
            rounds.append(pool.start([]))
        pool.finish(rounds.popleft())
    while pool.complete:
        yield pool.take(min(wanted, pool.complete))


@dataclass
class _Round:
    """Groups that the engines work on, by their replica; and the engine's own ticket, on ranks of the rollout."""

    groups: list[list[int]]
    ticket: int | None


@dataclass
class _Group:
    prompt: Prompt
    samples: list[Sample]

    @property
    def ended(self) -> bool:
        return all(sample.ended for sample in self.samples)

    @property
    def lengths(self) -> list[int]:
        return [len(sample.prompt) + len(sample.tokens) for sample in self.samples]


class _Pool:
    """Groups under way or complete. Every rank knows where each is; its replica's ranks hold it."""

    def __init__(self, rollout: Rollout, num_samples: int) -> None:
        self.rollout, self.num_samples = rollout, num_samples
        self.replica: dict[int, int] = {}
        """Group (numbered in the order of the prompts) -> its replica."""
        self.carried: list[int] = []
        """Groups that are neither complete nor in a round."""
        self._complete: deque[tuple[int, list[int]]] = deque()
        """Group, tokens of each of its rows."""
        self._held: dict[int, _Group] = {}
        self._count = 0

    @property
    def complete(self) -> int:
        """Complete groups that no batch has taken."""
        return len(self._complete)

    def start(self, prompts: Sequence[Prompt]) -> _Round:
        """Everything carried over and new groups for these prompts, into work."""
        rollout = self.rollout
        mesh = rollout.mesh
        rollout.wake()
        with rollout.call("start", on_host=True):
            rollout.calls += 1
            first, self._count = self._count, self._count + len(prompts)
            for shard, share in enumerate(partition([len(prompt.tokens) for prompt in prompts], mesh.data)):
                self.replica.update({first + p: shard for p in share})
            numbers = [*self.carried, *range(first, self._count)]
            self.carried = []
            work = _Round([[n for n in numbers if self.replica[n] == shard] for shard in range(mesh.data)], None)
            rollout.under_way.append(work)
            if rollout.member:
                mine = work.groups[rollout.shard or 0]
                for number in (n for n in mine if n >= first):
                    seed = request_seed(rollout.seed, rollout.calls, number - first)
                    prompt = prompts[number - first]
                    samples = [Sample(list(prompt.tokens), seed + i) for i in range(self.num_samples)]
                    self._held[number] = _Group(prompt, samples)
                going_on = [one for number in mine for one in self._held[number].samples if not one.ended]
                work.ticket = rollout.engine.resume(going_on, rollout.sampling, rollout.overlap.step_tokens)
            return work

    def finish(self, work: _Round) -> None:
        """Wait for a round; every rank learns which of its groups are complete."""
        rollout = self.rollout
        rollout.under_way.remove(work)
        lengths: dict[int, list[int]] = {}
        with rollout.working():
            if work.ticket is not None:
                grown = iter(rollout.engine.finish(work.ticket))
                mine = [self._held[number] for number in work.groups[rollout.shard or 0]]
                for group in mine:
                    group.samples = [one if one.ended else next(grown) for one in group.samples]
                ended = {n: self._held[n].lengths for n in work.groups[rollout.shard or 0] if self._held[n].ended}
                check = sum(sum(one.tokens) for group in mine for one in group.samples)
                for found in rollout.agreed(ended, check):
                    lengths |= found
        lengths = Ref(rollout, lengths).get()
        for number in sorted(n for share in work.groups for n in share):
            if number in lengths:
                self._complete.append((number, lengths[number]))
            else:
                self.carried.append(number)

    def take(self, groups: int) -> Ref:
        """The groups that have been complete for longest, as a batch."""
        rollout, size = self.rollout, self.num_samples
        taken = [self._complete.popleft() for _ in range(groups)]
        rows = Rows(size, set(range(rollout.world.size)), [tokens for _, lengths in taken for tokens in lengths])
        shares: list[list[int]] = [[] for _ in range(rollout.mesh.data)]
        for place, (number, _) in enumerate(taken):
            shares[self.replica.pop(number)].extend(range(place * size, (place + 1) * size))
        fixed = tuple(map(tuple, shares))
        if not rollout.member:
            return Ref(rollout, None, rows, fixed)
        mine = [self._held.pop(taken[row // size][0]) for row in shares[rollout.shard or 0][::size]]
        samples = as_samples([g.prompt for g in mine for _ in g.samples], [one for g in mine for one in g.samples])
        return Ref(rollout, samples, rows, fixed)
