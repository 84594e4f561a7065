"""Which role call comes next: after each two, the one that came after them last time."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from aligner.spmd.memory_account import Key


@dataclass(frozen=True)
class NeedingCall:
    """A role call that needs parts on the device."""

    what: str
    """role.method."""
    needed: frozenset[Key]
    ranks: frozenset[int]
    """Of all roles that take part."""


class CallOrder:
    """The role calls so far, the same on every rank."""

    def __init__(self) -> None:
        self._last = ("", "")
        self._after: dict[tuple[str, str], NeedingCall] = {}

    def record(self, call: NeedingCall) -> None:
        """This call has come."""
        self._after[self._last] = call
        self._last = (self._last[1], call.what)

    def following(self) -> Iterator[NeedingCall]:
        """What comes next if it goes as last time, as far as that says anything new."""
        pair, seen = self._last, set[tuple[str, str]]()
        while pair in self._after and pair not in seen:
            seen.add(pair)
            call = self._after[pair]
            yield call
            pair = (pair[1], call.what)

    def calls_until(self, keys: Set[Key]) -> dict[Key, int]:
        """How many calls from now each of these parts is needed; none that comes back is in none."""
        until: dict[Key, int] = {}
        for distance, call in enumerate(self.following(), start=1):
            for key in call.needed & keys:
                until.setdefault(key, distance)
        return until
