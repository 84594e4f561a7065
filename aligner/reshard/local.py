"""Weights that one process holds by itself, in plain tensors or files: the ends of a copy without other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from aligner.reshard.message.proof import View
from aligner.reshard.message.storage import check_disjoint, strided_view
from aligner.reshard.plan.layout import ExplicitLayout
from aligner.reshard.plan.region import Layout, Piece
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reshard.weights import ShardedWeights, WritableWeights

BUCKET_BYTES = 64 << 20
"""Bound on the extra memory of a copy."""
_RANK = 0
"""Of the only process, in the layouts of both ends."""


class LocalWeights:
    """A source: pieces, and what gives a view of each."""

    def __init__(self, pieces: Layout, view: View) -> None:
        self._pieces, self._view = pieces, view

    @property
    def layout(self) -> ExplicitLayout:
        """Of this process as rank 0 of a world of one."""
        return ExplicitLayout({_RANK: self._pieces})

    def pieces(self) -> Layout:
        return self._pieces

    def view(self, piece: Piece) -> Tensor:
        return self._view(piece)


class WritableLocalWeights(LocalWeights):
    """A destination; its pieces must be disjoint, and each element must be written exactly once."""

    def __init__(self, pieces: Layout, view: View) -> None:
        super().__init__(pieces, view)
        check_disjoint(pieces)
        self._names = {piece.storage: piece.name for piece in reversed(pieces)}
        self.discard()

    def writing(self) -> AbstractContextManager[None]:
        """Nothing is derived."""
        return nullcontext()

    def written(self, pieces: Sequence[Piece], proof: bool = True) -> None:
        for piece in pieces:
            self._missing[piece.storage] -= piece.elements

    def finish(self) -> None:
        wrong = {storage: count for storage, count in self._missing.items() if count}
        if wrong:
            storage, count = next(iter(wrong.items()))
            reason = f"{count} elements were not written" if count > 0 else f"{-count} elements were written twice"
            raise RuntimeError(f"reshard: {storage} ({self._names[storage]}): {reason}")

    def discard(self) -> None:
        """Every element is to be written anew."""
        self._missing: dict[str, int] = {}
        for piece in self._pieces:
            self._missing[piece.storage] = self._missing.get(piece.storage, 0) + piece.elements


class TensorWeights(WritableLocalWeights):
    """Contiguous tensors by storage name."""

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Layout) -> None:
        super().__init__(pieces, lambda piece: strided_view(tensors[piece.storage], piece))


def copy_weights(source: ShardedWeights, destination: WritableWeights, verify: bool = True) -> SyncStats:
    """Fill the pieces that this process holds of `destination` from those that it holds of `source`, without any other rank.

    Values are cast to the destination's dtypes.

    Args:
        verify: compare each region bit for bit after it was written.

    Returns:
        What was copied, and how long it took.

    Raises:
        ValueError: the source lacks a region of the destination, or has it in another shape.
        RuntimeError: the destination does not hold what the source held.
    """
    plan = plan_transfer(_RANK, {_RANK: source.pieces()}, {_RANK: destination.pieces()})
    return execute(plan, source.view, destination, None, torch.device("cpu"), BUCKET_BYTES, verify)
