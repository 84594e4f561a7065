"""The lockstep journal: this rank's role calls in order, with a running digest by which ranks compare their histories; and
the comparison."""

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
class RoleCall:
    """One entry: the `number`-th role call of this rank, at training step `step`; `digest` covers all calls up to it."""

    number: int
    digest: int
    step: int
    what: str

    def __str__(self) -> str:
        return f"call {self.number}: {self.what} (step {self.step})"


class Journal:
    """Role calls of this rank; the last `KEPT` are stored for comparison and reports."""

    KEPT = 512

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.calls: deque[RoleCall] = deque([RoleCall(0, 0, 0, "start")], maxlen=self.KEPT)

    def enter(self, what: str) -> None:
        """Record a role call; all ranks must record the same ones in the same order."""
        last = self.calls[-1]
        self.calls.append(RoleCall(last.number + 1, zlib.crc32(what.encode(), last.digest), self.step, what))

    def stamp(self) -> tuple[int, int]:
        """(number, digest) of the current call: equal on two ranks if and only if their histories are equal (up to CRC-32
        collisions)."""
        return self.calls[-1].number, self.calls[-1].digest

    def at(self, number: int) -> RoleCall | None:
        """The stored call with this number, or None."""
        return next((call for call in self.calls if call.number == number), None)

    def disagree(self, peer: int, their_number: int) -> NoReturn:
        """Raises LockstepError: a message from `peer` has a history that differs from this rank's."""
        raise LockstepError(
            f"rank {self.rank} and rank {peer} are not in lockstep: rank {self.rank} is at {self.calls[-1]}, "
            f"rank {peer} is at its call {their_number} with another history. Every rank must run the same role calls: "
            "look for a branch on a value that differs between ranks (use ref.gather() before branching)."
        )


def history_as_bytes(calls: Iterable[RoleCall]) -> bytes:
    """Encode consecutive calls: the last one's number (int64), then all digests (uint32), newest first."""
    newest_first = list(calls)[::-1]
    digests = np.array([call.digest for call in newest_first], np.uint32)
    return np.int64(newest_first[0].number).tobytes() + digests.tobytes()


def history_from_bytes(raw: bytes) -> dict[int, int]:
    """Decode `history_as_bytes` to {number: digest}."""
    last = int(np.frombuffer(raw, np.int64, 1)[0])
    return {last - back: digest for back, digest in enumerate(np.frombuffer(raw, np.uint32, offset=8).tolist())}


def histories_agree(published: Sequence[bytes]) -> bool:
    """Whether all ranks have the same digest at the last call that every rank has made (it covers all calls before)."""
    last = [int.from_bytes(raw[:8], "little") for raw in published]
    common = min(last)
    offsets = [8 + 4 * (number - common) for number in last]  # beyond the end: the rank no longer stores that call
    return len({raw[offset : offset + 4] for raw, offset in zip(published, offsets, strict=True)} - {b""}) <= 1


def first_difference(histories: list[dict[int, int]]) -> int | None:
    """Lowest call number at which two ranks' digests differ, or None. Histories: {number: digest} per rank."""
    digests: dict[int, int] = {}
    wrong = [n for history in histories for n, digest in history.items() if digests.setdefault(n, digest) != digest]
    return min(wrong, default=None)
