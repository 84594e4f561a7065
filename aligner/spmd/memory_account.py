"""What role calls take of each rank's memory, as all ranks know it, and what must leave for the next one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

Key = tuple[str, str]
"""(role, part)."""
K = TypeVar("K")
SPARE = 0.1
"""Of the budget."""


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes that one rank has measured, or the largest of several ranks."""

    parts: Mapping[Key, float] = field(default_factory=dict)
    """What each part holds on the device while it is there."""
    beyond: Mapping[str, float] = field(default_factory=dict)
    """Role call -> the most that the process held during it, less the parts that were there: activations, messages,
    libraries, everything else."""

    def merged(self, other: MemoryFigures) -> MemoryFigures:
        """The larger of both; associative."""
        return MemoryFigures(_larger(self.parts, other.parts), _larger(self.beyond, other.beyond))


class MemoryAccount:
    """Budget, parts and calls. Every rank has the same, and so comes to the same decisions, without a message.

    Args:
        budget: bytes of each rank.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._known = MemoryFigures()

    def learn(self, figures: MemoryFigures) -> None:
        """Take in what the ranks have measured, merged over all of them. Calls vary: the largest so far counts."""
        self._known = MemoryFigures({**self._known.parts, **figures.parts}, _larger(self._known.beyond, figures.beyond))

    def forget_calls(self) -> None:
        """Calls will take less from now on: each has all the room until it has been measured again."""
        self._known = MemoryFigures(self._known.parts)

    def measured(self, call: str) -> bool:
        """Whether it is known what the call takes."""
        return call in self._known.beyond

    def must_leave(
        self, call: str, staying: Set[Key], candidates: Sequence[Key], sharing: Collection[Collection[str]]
    ) -> list[Key]:
        """Which of the candidates leave, so that the call fits on every rank; all of them where nothing is known of it.

        Args:
            staying: what is there during the call in any case.
            candidates: what is there and could leave, the first to go first.
            sharing: the roles on each rank that the call concerns; equal ones once.
        """
        if not self.measured(call):
            return list(candidates)
        leaving = [key for key in candidates if key not in self._known.parts]
        rest = [key for key in candidates if key in self._known.parts]
        for key in tuple(rest):
            held = staying | set(rest)
            if any(key[0] in roles and self.needed(call, roles, held) > self.budget for roles in sharing):
                rest.remove(key)
                leaving.append(key)
        return leaving

    def size(self, key: Key) -> float:
        """Of a part, in bytes; 0 where nobody has measured it."""
        return self._known.parts.get(key, 0.0)

    def has_room(self, call: str, held: Iterable[Key], sharing: Collection[Collection[str]]) -> bool:
        """Whether the call fits on every rank with a tenth of the budget to spare, which is more than scattered blocks of freed
        memory take."""
        held = tuple(held)
        return all(self.needed(call, roles, held) <= (1 - SPARE) * self.budget for roles in sharing)

    def needed(self, call: str, roles: Collection[str], held: Iterable[Key]) -> float:
        """Bytes on a rank with these roles, while the call runs and `held` is there; what nobody has measured counts 0."""
        parts = sum(self.size(key) for key in held if key[0] in roles)
        return parts + self._known.beyond.get(call, 0.0)


def _larger(one: Mapping[K, float], other: Mapping[K, float]) -> dict[K, float]:
    return {key: max(one.get(key, 0.0), other.get(key, 0.0)) for key in {**one, **other}}
