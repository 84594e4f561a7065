"""Which regions of transformers' parameters hold the checkpoint's tensors: all of them, on every rank of the role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from aligner.models.spec import ModelSpec
from aligner.models.transformers_model import held_tensors
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import Mesh


class WholeLayout:
    """Every rank of a mesh holds the whole model, as transformers' class lays it out (experts in one tensor, for example).

    Args:
        dtype: of the engine. A parameter that transformers keeps in float32 differs from this; then the job exchanges the
            real layouts.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str) -> None:
        self._spec, self._mesh, self._dtype = spec, mesh, dtype

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What each rank holds."""
        return tuple(replace(piece, dtype=self._dtype) for held in held_tensors(self._spec) for piece in held.pieces)

    @cached_property
    def _by_name(self) -> dict[str, Piece]:
        return {piece.name: piece for piece in self.pieces}

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the role, ascending."""
        return self._mesh.ranks

    def layout(self, rank: int) -> Sequence[Piece]:
        """Everything, on the role's ranks."""
        return self.pieces if rank in self._mesh.ranks else ()

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """The one piece of a tensor, which all ranks hold."""
        piece = self._by_name.get(name)
        return [] if piece is None else [(piece, self._mesh.ranks)]
