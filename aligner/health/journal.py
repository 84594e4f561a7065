"""The lockstep journal: what this rank called, in order, as a running digest; journals as bytes, and where two differ."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np


class LockstepError(RuntimeError):
    """Ranks issued different role calls."""


@dataclass(frozen=True)
class Call:
    """One entry: the `number`-th role call of this rank, at loop step `step`."""

    number: int
    digest: int
    step: int
    what: str

    def __str__(self) -> str:
        return f"call {self.number}: {self.what} (step {self.step})"


class Journal:
    """Role calls of this rank; the last `KEPT` are kept to be compared and shown."""

    KEPT = 512

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.calls: deque[Call] = deque([Call(0, 0, 0, "start")], maxlen=self.KEPT)

    def enter(self, what: str) -> None:
        """Note a role call; every rank must note the same ones in the same order."""
        last = self.calls[-1]
        self.calls.append(Call(last.number + 1, zlib.crc32(what.encode(), last.digest), self.step, what))

    def stamp(self) -> tuple[int, int]:
        """(number, digest) of the current call: equal on two ranks iff their whole histories are equal."""
        return self.calls[-1].number, self.calls[-1].digest

    def at(self, number: int) -> Call | None:
        """The kept call with this number."""
        return next((call for call in self.calls if call.number == number), None)

    def disagree(self, peer: int, their_number: int) -> NoReturn:
        """A message from `peer` carries another history than ours."""
        raise LockstepError(
            f"rank {self.rank} and rank {peer} are not in lockstep: rank {self.rank} is at {self.calls[-1]}, "
            f"rank {peer} is at its call {their_number} with another history. Every rank must run the same role calls: "
            "look for a branch on a value that differs between ranks (use ref.gather() before branching)."
        )


def as_bytes(calls: Iterable[Call]) -> bytes:
    """Consecutive calls: the last one's number (int64), then every digest (uint32), the last one's first."""
    newest_first = list(calls)[::-1]
    digests = np.array([call.digest for call in newest_first], np.uint32)
    return np.int64(newest_first[0].number).tobytes() + digests.tobytes()


def from_bytes(raw: bytes) -> dict[int, int]:
    """{number: digest}."""
    last = int(np.frombuffer(raw, np.int64, 1)[0])
    return {last - back: digest for back, digest in enumerate(np.frombuffer(raw, np.uint32, offset=8).tolist())}


def agree(published: Sequence[bytes]) -> bool:
    """Whether all ranks have one digest at the last call that every rank has made; it covers all calls before it."""
    last = [int.from_bytes(raw[:8], "little") for raw in published]
    common = min(last)
    places = [8 + 4 * (number - common) for number in last]  # beyond the end: a rank that no longer knows
    return len({raw[place : place + 4] for raw, place in zip(published, places, strict=True)} - {b""}) <= 1


def first_difference(histories: list[dict[int, int]]) -> int | None:
    """Lowest call number at which two ranks' digests differ, or None. Histories: {number: digest} per rank."""
    seen: dict[int, int] = {}
    wrong = [n for history in histories for n, digest in history.items() if seen.setdefault(n, digest) != digest]
    return min(wrong, default=None)
