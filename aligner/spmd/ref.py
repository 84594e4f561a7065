"""`Ref`: a value with a home. Only the home's ranks hold it; it moves when another role reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, partition

if TYPE_CHECKING:
    from aligner.spmd.role import Role


@dataclass
class Rows:
    """The rows of one batch: every value computed from it lines up by global row number.

    `known` is kept equal on all ranks (each sees every role call), so both ends of a transfer agree on who still
    has to be told the lengths.
    """

    group_size: int
    """Rows of one prompt."""
    known: set[int]
    """World ranks that hold `lengths`."""
    lengths: list[int] | None = None
    """Tokens of each row, in global order; None on ranks that have not needed it."""
    _shares: dict[tuple[int, int, Cost], Shares] = field(default_factory=dict, repr=False)

    def shares(self, shards: int, minibatches: int = 1, cost: Cost = TOKENS) -> Shares:
        """The partition of these rows, computed once; needs the lengths."""
        key = (shards, minibatches, cost)
        if key not in self._shares:
            assert self.lengths is not None, "a rank that has not learned the lengths asks for the partition"
            self._shares[key] = partition(self.lengths, shards, self.group_size, minibatches, cost)
        return self._shares[key]


@dataclass(frozen=True, eq=False)
class Ref:
    """What a role call returns: sharded by rows over the home's data-parallel shards, replicated over the rest.

    `ref.get()` brings the value to every rank; `ref["field"]` is a Ref to one field of a dataclass or dict.
    """

    home: Role
    value: Any = field(default=None, repr=False)
    """This rank's shard on home ranks, None elsewhere."""
    rows: Rows | None = None
    """None for a value that is not row-wise (metrics): every home rank holds all of it."""
    fixed_shares: Shares | None = field(default=None, repr=False)
    """Rows of each shard where they are not `partition(lengths)`: a rollout replica holds what it sampled."""
    minibatches: int = 1
    kept: dict[Any, tuple[Any, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    """What roles have read of it, by (their shards, minibatches, cost): (value here, global rows). The keys are the same on
    every rank."""
    _fields: dict[str, Ref] = field(default_factory=dict, repr=False)

    @property
    def shares(self) -> Shares:
        """Global row numbers of each home shard; needs the lengths."""
        if self.fixed_shares is not None:
            return self.fixed_shares
        assert self.rows is not None
        return self.rows.shares(self.home.mesh.data, self.minibatches, self.home.cost)

    def __getitem__(self, name: str) -> Ref:
        if not isinstance(name, str):
            raise TypeError(f"a Ref has fields, not positions: ref[{name!r}]. Use ref.get() to bring the value here.")
        if name not in self._fields:
            value = _field(self.value, name) if self.home.member else None
            self._fields[name] = replace(self, value=value, kept={}, _fields={})
        found = self._fields[name]
        for key, (value, rows) in self.kept.items():
            found.kept.setdefault(key, (_field(value, name), rows))
        return found

    def get(self) -> Any:
        """The whole value, rows in global order, on every rank. A collective: every rank must call it."""
        from aligner.spmd.transfer import read_everywhere

        return read_everywhere(self)

    def _refusal(self, what: str) -> TypeError:
        return TypeError(
            f"{what} of a Ref (home: {self.home.name}) would make ranks take different branches, since only its home "
            "ranks hold the value. Bring it to every rank first: ref.get()."
        )

    def __bool__(self) -> bool:
        raise self._refusal("the truth value")

    def __len__(self) -> int:
        raise self._refusal("len()")

    def __iter__(self) -> NoReturn:
        raise self._refusal("iteration")

    def __float__(self) -> float:
        raise self._refusal("float()")

    def __int__(self) -> int:
        raise self._refusal("int()")

    def __eq__(self, other: object) -> bool:
        raise self._refusal("comparison")

    def __lt__(self, other: object) -> bool:
        raise self._refusal("comparison")

    __le__ = __gt__ = __ge__ = __ne__ = __lt__
    __hash__ = object.__hash__


def _field(value: Any, name: str) -> Any:
    """A field of a dict or dataclass; None where a rank holds nothing."""
    if value is None:
        return None
    return value[name] if isinstance(value, dict) else getattr(value, name)
