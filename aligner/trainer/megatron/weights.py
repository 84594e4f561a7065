"""The parameters of a Megatron-core model as one end of a weight transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.trainer.megatron.layout import MegatronLayout

if TYPE_CHECKING:
    from aligner.trainer.megatron.model import ShardedModel


class MegatronWeights:
    """This rank's shard of a model, and the layout of all ranks (`aligner.reshard.weights.ShardedWeights`)."""

    def __init__(self, layout: MegatronLayout, model: ShardedModel) -> None:
        self.layout, self._model = layout, model

    def pieces(self) -> Sequence[Piece]:
        """What the model's parameters on this rank hold."""
        return self._model.layout

    def view(self, piece: Piece) -> Tensor:
        """The strided view of a parameter that holds `piece`; writable."""
        return self._model.view(piece)
