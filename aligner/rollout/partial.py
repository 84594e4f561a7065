"""Partial rollouts: a step generates a bounded number of tokens per response; unfinished ones continue in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner.data.prompts import Prompt
from aligner.rollout.generation import GenerationRole
from aligner.rollout.kind import Place, RolloutKind
from aligner.rollout.rows import prompt_from, prompt_to
from aligner.spmd.messages import all_gather, broadcast
from aligner.spmd.partition import partition
from aligner.spmd.ref import Ref
from aligner.spmd.rows import BatchRows


class Partial(Iterator[Ref]):
    """Iterator over batches of complete groups (a prompt's samples), as many as the last batch had prompts, in completion order.

    A round takes one more batch of prompts and generates at most `stream.step_tokens` tokens for each unfinished response,
    new or carried over. A step runs rounds until enough groups are complete and returns the oldest ones. A group stays on
    its replica; with unchanged weights, interruptions do not change the tokens that are sampled.

    `lag` rounds are started ahead. Unfinished groups of a round join the next round even if it has already started;
    otherwise a response would continue only in every (lag + 1)-th round. With R = ceil(max_tokens / step_tokens), at most
    R + lag batches are in progress, complete ones included. A token is at most R + lag - 1 updates old if all responses
    take R rounds, and max(R, 2 R - 2) + lag - 1 for any lengths: carried-over groups wait while a step has enough
    complete groups without another round.
    """

    def __init__(
        self,
        rollout: GenerationRole,
        prompts: Iterable[Sequence[Prompt]],
        num_samples: int,
        lag: int,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self._prompts, self._lag = iter(prompts), lag
        self._pool = _Pool(rollout, num_samples)
        self._rounds: deque[_Round] = deque()
        self._wanted = 0
        if saved:
            self._wanted = saved["wanted"]
            self._rounds.extend(self._pool.restore(saved))

    def __next__(self) -> Ref:
        pool, rounds = self._pool, self._rounds
        while not self._wanted or pool.complete < self._wanted:
            batch = next(self._prompts, None)
            if batch is not None:
                self._wanted = len(batch)
                rounds.append(pool.start(batch))
            elif pool.carried and not rounds:  # the prompts are a finite iterable
                rounds.append(pool.start([]))
            elif not rounds:
                break
            most = self._lag if batch is not None else len(rounds) - 1
            while len(rounds) > most:  # several after a resume with a smaller lag
                pool.finish(rounds.popleft(), rounds[0] if rounds else None)
        if not pool.complete:
            raise StopIteration
        return pool.take(min(self._wanted, pool.complete))

    def state(self) -> dict[str, Any]:
        """Unfinished and complete groups as JSON; samples on rank 0 only. Collective over the world, after all started rounds
        have been finished."""
        return {"wanted": self._wanted, **self._pool.state(self._rounds)}


@dataclass(eq=False)
class _Part:
    """Groups submitted to the engines together, by replica; and the engine's ticket, on the rollout's ranks."""

    groups: list[list[int]]
    ticket: int | None


@dataclass(eq=False)
class _Round:
    """Groups that are waited for together: those it was started with, and those that joined later."""

    parts: list[_Part]

    @property
    def numbers(self) -> list[int]:
        """Its groups, ascending; the same on every rank."""
        return sorted(number for part in self.parts for share in part.groups for number in share)


@dataclass
class _Group:
    prompt: Prompt
    samples: list[Any]
    """`Generated`s."""

    @property
    def ended(self) -> bool:
        return all(sample.ended for sample in self.samples)

    @property
    def lengths(self) -> list[int]:
        return [sample.row_tokens for sample in self.samples]


class _Pool:
    """Unfinished and complete groups. Every rank knows each group's replica, whose ranks hold its samples."""

    def __init__(self, rollout: GenerationRole, num_samples: int) -> None:
        self.rollout, self.num_samples = rollout, num_samples
        self.replica: dict[int, int] = {}
        """Group number (in the order of the prompts) -> replica."""
        self.carried: list[int] = []
        """Numbers of groups that are neither complete nor in a round."""
        self._complete: deque[tuple[int, list[int]]] = deque()
        """Group, tokens of each of its rows."""
        self._held: dict[int, _Group] = {}
        self._count = 0

    @property
    def complete(self) -> int:
        """Number of complete groups that have not been returned."""
        return len(self._complete)

    @property
    def _kind(self) -> RolloutKind:
        """On the rollout's ranks."""
        return self.rollout.kind(self.rollout.plays)

    def start(self, prompts: Sequence[Prompt]) -> _Round:
        """Start a round with the carried-over groups and a new group for each of these prompts."""
        rollout = self.rollout
        rollout.wake()
        with rollout.call("start", on_host=True):
            rollout.calls += 1
            first, self._count = self._count, self._count + len(prompts)
            self._assign({first + place: prompt for place, prompt in enumerate(prompts)})
            numbers, self.carried = [*self.carried, *range(first, self._count)], []
            for number in (n for n in range(first, self._count) if rollout.member and self._is_here(n)):
                prompt, call = prompts[number - first], rollout.calls
                places = [Place(rollout.seed, call, number - first, i) for i in range(self.num_samples)]
                self._held[number] = _Group(prompt, [self._kind.begin(prompt, place) for place in places])
            work = _Round([self._submit(numbers)])
            rollout.under_way.append(work)
            return work

    def _join(self, work: _Round, numbers: Sequence[int]) -> None:
        """Let these groups continue in a round that has already started."""
        self.rollout.wake()
        with self.rollout.call("start", on_host=True):
            work.parts.append(self._submit(numbers))

    def _submit(self, numbers: Sequence[int]) -> _Part:
        """Submit groups to the engines, each for at most `stream.step_tokens` more tokens."""
        rollout, part = self.rollout, _Part(self._by_replica(numbers), None)
        if rollout.member:
            numbers_here = part.groups[rollout.shard or 0]
            unfinished = [one for number in numbers_here for one in self._held[number].samples if not one.ended]
            part.ticket = self._kind.resume(unfinished, rollout.sampling, rollout.overlap.step_tokens)
        return part

    def _is_here(self, number: int) -> bool:
        return self.replica[number] == (self.rollout.shard or 0)

    def _assign(self, prompts: Mapping[int, Prompt]) -> None:
        numbers = list(prompts)
        shares = partition([len(prompt.tokens) for prompt in prompts.values()], self.rollout.mesh.data)
        for shard, share in enumerate(shares):
            self.replica.update({numbers[place]: shard for place in share})

    def _by_replica(self, numbers: Sequence[int]) -> list[list[int]]:
        return [[n for n in numbers if self.replica[n] == shard] for shard in range(self.rollout.mesh.data)]

    def _absorb(self, work: _Round) -> dict[int, _Group]:
        """This replica's groups of a round, by number, with the newly generated tokens."""
        rollout = self.rollout
        groups: dict[int, _Group] = {}
        for part in work.parts:
            groups_here = {number: self._held[number] for number in part.groups[rollout.shard or 0]}
            if part.ticket is not None:
                continued = iter(self._kind.finish(part.ticket))
                part.ticket = None
                for group in groups_here.values():
                    group.samples = [one if one.ended else next(continued) for one in group.samples]
            groups |= groups_here
        return groups

    def finish(self, work: _Round, following: _Round | None) -> None:
        """Wait for a round; every rank learns which of its groups are complete. The others join the `following` round."""
        rollout = self.rollout
        rollout.under_way.remove(work)
        lengths: dict[int, list[int]] = {}
        with rollout.working():
            if rollout.member:
                groups_here = self._absorb(work)
                ended = {number: group.lengths for number, group in groups_here.items() if group.ended}
                drawn = sum(one.token_sum for group in groups_here.values() for one in group.samples)
                for replica_lengths in rollout.agreed(ended, drawn):
                    lengths |= replica_lengths
        lengths = Ref(rollout, lengths).gather()
        self._complete.extend((number, lengths[number]) for number in work.numbers if number in lengths)
        unfinished = [number for number in work.numbers if number not in lengths]
        if following is None:
            self.carried += unfinished
        elif unfinished:
            self._join(following, unfinished)

    def take(self, groups: int) -> Ref:
        """The oldest complete groups, as a batch: a Ref to Samples."""
        rollout, size = self.rollout, self.num_samples
        taken = [self._complete.popleft() for _ in range(groups)]
        rows = BatchRows(size, set(range(rollout.world.size)), [tokens for _, lengths in taken for tokens in lengths])
        shares: list[list[int]] = [[] for _ in range(rollout.mesh.data)]
        for place, (number, _) in enumerate(taken):
            shares[self.replica.pop(number)].extend(range(place * size, (place + 1) * size))
        fixed = tuple(map(tuple, shares))
        if not rollout.member:
            return Ref(rollout, None, rows, fixed)
        groups_here = [self._held.pop(taken[row // size][0]) for row in shares[rollout.shard or 0][::size]]
        samples = self._kind.samples(
            [g.prompt for g in groups_here for _ in g.samples], [one for g in groups_here for one in g.samples]
        )
        return Ref(rollout, samples, rows, fixed)

    def state(self, rounds: Iterable[_Round]) -> dict[str, Any]:
        """As JSON. Collective over the world."""
        rollout = self.rollout
        groups: dict[int, Any] = {}
        if rollout.member:
            for work in rounds:
                self._absorb(work)
            own_groups = {
                n: {"prompt": prompt_to(group.prompt), "samples": [self._kind.to_json(one) for one in group.samples]}
                for n, group in self._held.items()
            }
            for gathered in all_gather(rollout.world, own_groups, rollout.mesh.ranks):
                groups |= gathered
        groups = broadcast(rollout.world, groups, rollout.mesh.ranks, [0]) or {}
        return {
            "count": self._count,
            "carried": self.carried,
            "complete": [[number, lengths] for number, lengths in self._complete],
            "rounds": [work.numbers for work in rounds],
            "groups": [[number, groups[number]] for number in sorted(groups)],
        }

    def restore(self, saved: Mapping[str, Any]) -> list[_Round]:
        """Continue from a `state`, with groups reassigned to the present replicas. Returns its rounds."""
        rollout = self.rollout
        self._count, self.carried = saved["count"], list(saved["carried"])
        self._complete.extend((number, list(lengths)) for number, lengths in saved["complete"])
        prompts = {number: prompt_from(group["prompt"]) for number, group in saved["groups"]}
        self._assign(prompts)
        for number, group in saved["groups"]:
            if rollout.member and self.replica[number] == rollout.shard:
                prompt = prompts[number]
                own = [self._kind.from_json(one, prompt) for one in group["samples"]]
                self._held[number] = _Group(prompt, own)
        rounds = [_Round([_Part(self._by_replica(numbers), None)]) for numbers in saved["rounds"]]
        rollout.under_way += rounds
        return rounds
