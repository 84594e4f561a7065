"""One end of a weight transfer: which region of which checkpoint tensor each rank holds, and the memory itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.region import Piece


class ShardedWeights(Protocol):
    """Weights that are spread over ranks, as the source of a transfer.

    Every rank of the world has such an object; on ranks that hold none of the weights it is a `RemoteWeights`.
    """

    @property
    def layout(self) -> WeightLayout:
        """What each rank holds, by arithmetic; the same on every rank of the world."""

    def pieces(self) -> Sequence[Piece]:
        """What this rank holds in fact, which should be `layout.layout(rank)` in any order. Empty on ranks that hold
        nothing. The first call may be collective over the ranks of `layout`."""

    def view(self, piece: Piece) -> Tensor:
        """One of `pieces`, or a crop of one, as a strided view of shape `piece.size` in dtype `piece.dtype`."""


class StoredWeights(ShardedWeights, Protocol):
    """Weights whose storages are tensors that others can compute with."""

    def local(self, storage: str) -> Tensor:
        """What this rank holds of a storage of `pieces`, without gradients: the memory itself."""


class WritableWeights(ShardedWeights, Protocol):
    """Weights that a transfer overwrites, all of them in each transfer.

    A transfer writes through `view`, tells `written` of each region once, and ends with `finish`; after a failure the
    owner calls `discard` before the next one. From the first `view` until `finish` the weights are not valid.
    """

    def writing(self) -> AbstractContextManager[None]:
        """Around regions that are written one after the other, without any message between ranks: what their derivation
        needs of its surroundings is set up once for all of them."""

    def written(self, pieces: Sequence[Piece], proof: bool = True) -> None:
        """The regions `pieces` have been written through their views.

        The last region of a module lets the destination derive what its kernels read (packed weights, for example).

        Args:
            proof: prove that what was derived holds what was written.

        Raises:
            RuntimeError: one was written before in this transfer, or a proof failed.
        """

    def finish(self) -> None:
        """The transfer is complete: reset what was derived from the weights before. RuntimeError, naming the tensor,
        where a region was not written."""

    def discard(self) -> None:
        """Give up a transfer that failed. The weights stay invalid until the next one has finished."""


class RemoteWeights:
    """Either end of a transfer on a rank that holds nothing of it: only the other ranks' layout is known."""

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout

    def pieces(self) -> Sequence[Piece]:
        """Nothing is held here."""
        return ()

    def view(self, piece: Piece) -> Tensor:
        raise AssertionError(f"{piece.name}{piece.box} is held by other ranks ({self.layout.ranks})")

    def writing(self) -> AbstractContextManager[None]:
        """Nothing is written here."""
        return nullcontext()

    def written(self, pieces: Sequence[Piece], proof: bool = True) -> None:
        raise AssertionError(f"{pieces[0].name}{pieces[0].box} is held by other ranks ({self.layout.ranks})")

    def finish(self) -> None:
        """Nothing was written here."""

    def discard(self) -> None:
        """Nothing was written here."""
