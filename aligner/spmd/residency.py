"""Who is in memory: a role call brings in what it needs, and as much of what else is on its ranks leaves as must.

What is in or out is a pure function of the role calls so far, of the placement and of figures that all ranks share
(`MemoryAccount`), the same on every rank: a part is out on all of its role's ranks or on none. Loops never mention it;
`Role.needs` says what each call needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from aligner.spmd.call_order import CallOrder, NeedingCall
from aligner.spmd.memory import Meter, OutOfMemory, explain, is_out_of_memory, keep_freed, trim
from aligner.spmd.memory_account import Key, MemoryAccount, MemoryFigures
from aligner.spmd.mesh import Mesh
from aligner.spmd.residency_config import ResidencyConfig


class Part(Protocol):
    """Some of a role's memory on this rank's device."""

    resident: bool
    """Whether it is on the device."""

    def bytes(self) -> int:
        """Its size on the device while it is there."""

    def changed(self) -> None:
        """A call is about to change it: a copy on the host is no longer the same."""

    def evict(self) -> None:
        """Leave the device; called where `resident`."""

    def bring(self) -> None:
        """Come back; called where not `resident`."""


class Holder(Protocol):
    """What is asked of a role around its calls."""

    @property
    def name(self) -> str:
        """Of the role."""
        ...

    @property
    def mesh(self) -> Mesh:
        """Its ranks."""
        ...

    @property
    def member(self) -> bool:
        """Whether this rank is one of them."""
        ...

    @property
    def needs(self) -> Mapping[str, Sequence[str]]:
        """Method -> the parts that must be on the device; a method without an entry needs all."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """Methods that change nothing, so that copies on the host stay good."""
        ...


@dataclass(frozen=True)
class Kind:
    """What every rank knows of a part, member or not."""

    copied: bool = False
    """Leaving means a copy on the host, which frees nothing where the device is the host."""
    lost: bool = False
    """Its contents are gone once it has left: a role call must write them."""


@dataclass
class _Holding:
    """What one role holds, and where."""

    ranks: frozenset[int]
    kinds: dict[str, Kind] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    """Empty on ranks outside the role."""
    before_evict: Callable[[], None] | None = None
    on_lost: Callable[[], None] | None = None


class Residency:
    """One rank's view of all roles' parts. Without a configuration nothing ever moves."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.config = ResidencyConfig(mode="off")
        self.account: MemoryAccount | None = None
        """mode=auto: what every rank knows of memory. None: nothing, so that all leaves that a call does not need."""
        self.meter = Meter(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Copies to and from the host run here, beside the computation."""
        self._roles: dict[str, _Holding] = {}
        self._out: set[Key] = set()
        self._of_ranks: dict[frozenset[int], set[frozenset[str]]] = {}
        self._open: list[frozenset[Key]] = []
        self._order = CallOrder()
        self._beyond: dict[str, float] = {}
        self._keeps_freed: bool | None = None
        """CPU: freed memory is kept for the next allocation. None: it was given back so far; False: it is for good."""
        self._tight = True
        """Since figures were learned, something had to leave, or a call came close to the budget."""
        self._most = 0

    def register(
        self,
        role: str,
        mesh: Mesh,
        kinds: Mapping[str, Kind],
        parts: Mapping[str, Part] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """A role that was just built says what it holds; one of the same name that was there before is forgotten.

        Args:
            kinds: the same on every rank.
            parts: what is really here, on member ranks; they leave in the reverse order and come back in this one.
            on_lost: called on every rank, member or not, when a part whose contents are lost has left.
        """
        self._out -= {key for key in self._out if key[0] == role}
        self._of_ranks.clear()
        self._roles[role] = _Holding(frozenset(mesh.ranks), dict(kinds), dict(parts or {}), on_lost=on_lost)

    def before_evict(self, role: str, hook: Callable[[], None]) -> None:
        """Call `hook` before any part of this role leaves."""
        self._roles[role].before_evict = hook

    def is_out(self, role: str, part: str) -> bool:
        """Whether the part has left; the same on every rank."""
        return (role, part) in self._out

    def crowds(self, role: str, mesh: Mesh) -> bool:
        """Whether another role holds something on a rank of this one, and either may have to leave."""
        ranks = frozenset(mesh.ranks)
        others = (holder for name, holder in self._roles.items() if name != role and holder.kinds)
        return self.config.mode != "off" and any(holder.ranks & ranks for holder in others)

    def make_room(self, role: str, mesh: Mesh) -> None:
        """A role is about to be built on these ranks: everything there leaves."""
        if self.crowds(role, mesh):
            self._leave(NeedingCall("", frozenset(), frozenset(mesh.ranks)), arriving=True)
            if self.device.type == "cuda":  # the engine asks the device, not torch, for what is free
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()

    @contextmanager
    def call(self, roles: Sequence[Holder], method: str, on_host: bool = False) -> Iterator[None]:
        """Around a role call: what it needs is there, its memory is measured, running out of it is explained.

        Args:
            roles: whose call it is, and then the others that take part; each one's `needs` counts.
            on_host: it needs nothing.
        """
        what = f"{roles[0].name}.{method}"
        try:
            with (
                self._needed(what, () if on_host else roles, method) as needed,
                self.meter.measured(method, any(role.member for role in roles)) as largest,
            ):
                yield
            if needed and self.account and any(role.member for role in roles):
                beyond = largest() - self._resident_bytes()
                self._beyond[what] = max(self._beyond.get(what, 0.0), beyond)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(explain(error, what, self.device, self._held())) from error

    def take_figures(self) -> MemoryFigures:
        """What this rank has measured since the last time, for `MemoryAccount.learn`; nothing where there is no account."""
        if self.account is None:
            return MemoryFigures()
        parts = {(name, kind): float(part.bytes()) for name, kind, part in self._parts()}
        beyond, self._beyond = self._beyond, {}
        return MemoryFigures(parts, beyond)

    def learn(self, figures: MemoryFigures) -> None:
        """The figures of all ranks, merged, at the end of a step; the same on every rank."""
        if self.account is None:
            return
        self.account.learn(figures)
        if self._keeps_freed is None and not self._tight and self.device.type == "cpu":
            self._keeps_freed = True
            keep_freed(True)
        self._tight = False

    def _give_back(self) -> None:
        """A call does not fit beside all parts with what is kept of freed memory; without it, calls take less."""
        assert self.account is not None
        self._keeps_freed = False
        keep_freed(False)
        self.account.forget_calls()

    @contextmanager
    def _needed(self, what: str, roles: Sequence[Holder], method: str) -> Iterator[bool]:
        """Around a role call; yields whether it needs anything that could move."""
        needed = frozenset((role.name, part) for role in roles for part in self._needs(role, method))
        if not needed or self.config.mode == "off":
            yield False
            return
        ranks = frozenset[int]().union(*(role.mesh.ranks for role in roles))
        self._order.record(NeedingCall(what, needed, ranks))
        # what a call around this one needs may be in use
        self._open.append(needed.union(*self._open))
        try:
            self._leave(NeedingCall(what, self._open[-1], ranks))
            self._come(needed)
            for role in roles:
                if method not in role.reads:
                    self._changed(key for key in needed if key[0] == role.name)
            yield True
        finally:
            self._open.pop()
        if not self._open:
            self._prefetch()

    def _needs(self, role: Holder, method: str) -> Sequence[str]:
        """A call that the role's table does not name needs everything: it may touch what it likes."""
        holder = self._roles.get(role.name)
        return role.needs.get(method, tuple(holder.kinds) if holder else ())

    def _leave(self, call: NeedingCall, prefetching: bool = False, arriving: bool = False) -> None:
        """What must leave for the call does; `arriving`: for a role that is built, which shares these ranks."""
        leaving = self._leaving(call, arriving)
        if prefetching:  # what only a role call can write again waits for the call itself
            leaving = {(name, part) for name, part in leaving if not self._roles[name].kinds[part].lost}
        freed = False
        for name, holder in self._roles.items():
            kinds = [part for part in holder.kinds if (name, part) in leaving]
            here = [holder.parts[p] for p in reversed(kinds) if p in holder.parts and holder.parts[p].resident]
            if holder.before_evict and here:
                holder.before_evict()
            for part in here:
                part.evict()
            gone = [part for part in kinds if (name, part) not in self._out]
            self._out |= {(name, part) for part in gone}
            if holder.on_lost and any(holder.kinds[part].lost for part in gone):
                holder.on_lost()
            freed = freed or bool(here)
        # also where nothing leaves: what earlier calls have freed would count as the next one's
        if self.device.type == "cpu" and (freed or self.account) and not self._keeps_freed:
            trim()

    def _leaving(self, call: NeedingCall, arriving: bool) -> set[Key]:
        """What the call does not need, where its role has one of the call's ranks and shares ranks with another, and must
        leave. What is out already counts too: a wrong guess may have brought it."""
        movable = {
            (name, part)
            for name, holder in self._roles.items()
            if holder.ranks & call.ranks and (arriving or self._shared(name))
            for part in holder.kinds
            if (name, part) not in call.needed and self._movable(name, part)
        }
        if self.config.mode == "offload" or self.account is None:
            return movable
        here = movable - self._out
        held = {(name, part) for name, holder in self._roles.items() for part in holder.kinds} - self._out
        staying = (held - here) | call.needed
        candidates, sharing = self._latest_needed_first(here), self._sharing(call.ranks)
        go = self.account.must_leave(call.what, staying, candidates, sharing)
        if go and self._keeps_freed and self.account.measured(call.what):
            self._give_back()
            go = candidates
        self._tight = self._tight or bool(go) or not self.account.has_room(call.what, staying | here, sharing)
        return (movable & self._out).union(go)

    def _latest_needed_first(self, keys: set[Key]) -> list[Key]:
        """Among equals first what is remade at no cost, then the larger."""
        until = self._order.calls_until(keys)

        def rank(key: Key) -> tuple[float, bool, bool, float, Key]:
            kind = self._roles[key[0]].kinds[key[1]]
            size = self.account.size(key) if self.account else 0.0
            return -until.get(key, math.inf), kind.lost, kind.copied, -size, key

        return sorted(keys, key=rank)

    def _sharing(self, ranks: frozenset[int]) -> set[frozenset[str]]:
        """The roles on each of these ranks."""
        if ranks not in self._of_ranks:
            roles = self._roles.items()
            self._of_ranks[ranks] = {frozenset(name for name, holder in roles if r in holder.ranks) for r in ranks}
        return self._of_ranks[ranks]

    def _come(self, needed: frozenset[Key]) -> None:
        for name, holder in self._roles.items():
            for kind in holder.kinds:
                if (name, kind) in needed:
                    self._out.discard((name, kind))
                    part = holder.parts.get(kind)
                    if part is not None and not part.resident:
                        part.bring()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if self._ahead:
            self._most = max(self._most, self._resident_bytes())

    def _prefetch(self) -> None:
        """Start what the next call will do, if it is the one that came after these two last time.

        A wrong guess costs time and nothing else: nothing leaves that only a role call could write again, and a part
        that is here too early counts as out until a call needs it. No more is held than calls have held before.
        """
        call = next(self._order.following(), None)
        if call is None or not self._ahead:
            return
        self._leave(call, prefetching=True)
        room = self._most - self._resident_bytes()
        for name, holder in self._roles.items():
            for kind, part in holder.parts.items():
                if (name, kind) in call.needed and not part.resident and part.bytes() <= room:
                    room -= part.bytes()
                    part.bring()

    @property
    def _ahead(self) -> bool:
        """Whether there is anything to gain, or to test, from moving ahead of a call."""
        return self.config.prefetch and (self.stream is not None or self.config.mode == "offload")

    def _changed(self, keys: Iterator[Key]) -> None:
        for name, kind in keys:
            part = self._roles[name].parts.get(kind) if name in self._roles else None
            if part is not None:
                part.changed()

    def _shared(self, role: str) -> bool:
        own_ranks = self._roles[role].ranks
        return any(own_ranks & other.ranks for name, other in self._roles.items() if name != role and other.kinds)

    def _movable(self, role: str, part: str) -> bool:
        kind, config = self._roles[role].kinds[part], self.config
        if role in config.keep or f"{role}.{part}" in config.keep:
            return False
        return not kind.copied or self.device.type == "cuda" or config.mode == "offload"

    def _resident_bytes(self) -> int:
        return sum(size for _, size, resident in self._held() if resident)

    def _held(self) -> list[tuple[str, int, bool]]:
        """(role.part, bytes, on the device) of everything on this rank."""
        return [(f"{name}.{kind}", part.bytes(), part.resident) for name, kind, part in self._parts()]

    def _parts(self) -> Iterator[tuple[str, str, Part]]:
        for name, holder in self._roles.items():
            for kind, part in holder.parts.items():
                yield name, kind, part
