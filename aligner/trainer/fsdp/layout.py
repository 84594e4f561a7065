"""Which regions of which checkpoint tensors the ranks of a role on FSDP hold, by rank and by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod

from aligner.models.spec import ModelSpec
from aligner.models.transformers_model import HeldTensor, held_tensors
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import Mesh
from aligner.trainer.flat_range import clip


def shard_rows(rows: int, shards: int, shard: int) -> range:
    """The rows of a parameter that a shard holds: ceil(rows / shards) each, the last ones fewer or none, as FSDP2 cuts it."""
    size = -(-rows // shards)
    return range(min(shard * size, rows), min((shard + 1) * size, rows))


class FsdpLayout:
    """The weight layout of a role on FSDP: each parameter of transformers' model is cut along its first dimension.

    Storages have the names of transformers' model and hold a rank's rows of a parameter, or a whole buffer. They are float32
    (the masters) in any model that learns, whatever the data type that it computes in; buffers are float32 in every model.

    Raises:
        ValueError: see `held_tensors`.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str = "float32") -> None:
        self.held = held_tensors(spec)
        self._mesh, self._dtype = mesh, dtype
        self._of_shard: dict[int, list[Piece]] = {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the role, ascending."""
        return self._mesh.ranks

    @property
    def shards(self) -> int:
        """Number of ranks that one replica of the weights is cut over."""
        return len(self._mesh.replica_ranks[0])

    def shard(self, rank: int) -> int:
        """The shard that a rank of the role holds."""
        return next(ranks.index(rank) for ranks in self._mesh.replica_ranks if rank in ranks)

    def layout(self, rank: int) -> Sequence[Piece]:
        """All pieces that one rank holds; none if the rank is not one of the role's."""
        return self._pieces(self.shard(rank)) if rank in self._mesh.ranks else []

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """The distinct pieces of a checkpoint tensor, each with the ranks that hold it, ascending."""
        held = self._held_by_name.get(name)
        if held is None:
            return []
        ranks_of: dict[Piece, list[int]] = {}
        for shard, ranks in enumerate(zip(*self._mesh.replica_ranks, strict=True)):
            for piece in self._in_shard(held, shard):
                if piece.name == name:
                    ranks_of.setdefault(piece, []).extend(ranks)
        return [(piece, tuple(sorted(ranks))) for piece, ranks in ranks_of.items()]

    def _pieces(self, shard: int) -> list[Piece]:
        if shard not in self._of_shard:
            self._of_shard[shard] = [piece for held in self.held for piece in self._in_shard(held, shard)]
        return self._of_shard[shard]

    def _in_shard(self, held: HeldTensor, shard: int) -> list[Piece]:
        if not held.trained:
            return list(held.pieces)
        whole = [replace_dtype(piece, self._dtype) for piece in held.pieces]
        if not held.shape:
            return whole
        rows, width = shard_rows(held.shape[0], self.shards, shard), prod(held.shape[1:])
        return [part for piece in whole for part in clip(piece, rows.start * width, rows.stop * width)]

    @cached_property
    def _held_by_name(self) -> Mapping[str, HeldTensor]:
        return {piece.name: held for held in self.held for piece in held.pieces}


def replace_dtype(piece: Piece, dtype: str) -> Piece:
    """The same region of a storage of another data type."""
    return Piece(piece.name, piece.lo, piece.size, piece.storage, piece.offset, piece.stride, dtype)
