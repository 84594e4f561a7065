"""Weight layouts: which region of which checkpoint tensor each rank holds, by rank or by tensor (pure, no torch)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from aligner.reshard.plan.region import Layout, Piece

R = TypeVar("R")


class WeightLayout(Protocol):
    """Which region of which checkpoint tensor every rank of one end of a transfer holds."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks that hold something, ascending."""

    def layout(self, rank: int) -> Sequence[Piece]:
        """Everything that one rank holds, empty for ranks outside `ranks`; time is proportional to its own pieces."""

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """Every distinct piece of one logical tensor with the ranks that hold it in that very form, ascending.

        Empty where nobody holds the tensor. Time is proportional to the distinct pieces of this one tensor, never to the
        model. The same box may appear in several forms (other strides, storages or dtypes), also on one rank.
        """


class LazyHolders(Sequence[tuple[Piece, tuple[int, ...]]]):
    """What `holders` returns, with pieces that are made only when they are looked at.

    Args:
        form: equal for tensors of this layout that have the same boxes, dtype and ranks, and for no others.
        regions: what each piece is made of, with the ranks that hold it.
        make: a region -> its piece.
    """

    def __init__(
        self, form: Hashable, regions: Sequence[tuple[R, tuple[int, ...]]], make: Callable[[R], Piece]
    ) -> None:
        self.form, self._regions, self._make = form, regions, make

    def __len__(self) -> int:
        return len(self._regions)

    def __getitem__(self, index: Any) -> Any:
        region, ranks = self._regions[index]
        return self._make(region), ranks


class ExplicitLayout:
    """A layout given as every rank's pieces, such as ranks have exchanged."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self._layouts = {rank: layouts[rank] for rank in sorted(layouts)}
        self._holders: dict[str, list[tuple[Piece, tuple[int, ...]]]] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self._layouts)

    def layout(self, rank: int) -> Layout:
        return self._layouts.get(rank, ())

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        if self._holders is None:
            self._holders = _index(self._layouts)
        return self._holders.get(name, ())


class UnknownLayout:
    """The ranks of one end whose pieces nobody knows by arithmetic: a sync exchanges what ranks hold in fact."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def layout(self, rank: int) -> Layout:
        """Nothing that is known."""
        return ()

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """Nothing that is known."""
        return ()


def as_layout(given: WeightLayout | Mapping[int, Layout]) -> WeightLayout:
    """Every rank's pieces as a layout; a layout as it is."""
    return ExplicitLayout(given) if isinstance(given, Mapping) else given


def _index(layouts: Mapping[int, Layout]) -> dict[str, list[tuple[Piece, tuple[int, ...]]]]:
    """Tensor -> its distinct pieces with their holders; ranks that share one layout object are read once."""
    sharers: dict[int, list[int]] = {}
    for rank, layout in layouts.items():
        sharers.setdefault(id(layout), []).append(rank)
    holders: dict[str, dict[Piece, set[int]]] = {}
    for ranks in sharers.values():
        for piece in layouts[ranks[0]]:
            holders.setdefault(piece.name, {}).setdefault(piece, set()).update(ranks)
    tuples: dict[frozenset[int], tuple[int, ...]] = {}
    return {
        name: [(piece, tuples.setdefault(frozenset(ranks), tuple(sorted(ranks)))) for piece, ranks in pieces.items()]
        for name, pieces in holders.items()
    }
