"""The parameters of transformers' model as the destination of a weight sync: regions are written where they are computed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from aligner.models.spec import ModelSpec
from aligner.models.transformers_model import held_tensors
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.region import Piece
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.written_regions import WrittenRegions


class TransformersWeights:
    """Every tensor of the checkpoint, in the parameters of a `TransformersEngine` (`aligner.reshard.weights.WritableWeights`).

    Nothing is derived from them: the executor's checksums read the very storage that the model computes with.

    Args:
        storages: the model's parameters, and the buffers that checkpoints hold, by name.
        loaded: says whether they are complete.
        on_finish: called when a transfer has written all of them.
        layout: of all ranks of the role; None: an engine by itself, of which nobody asks that.
    """

    def __init__(
        self,
        spec: ModelSpec,
        storages: Mapping[str, Tensor],
        loaded: LoadedWeights,
        on_finish: Callable[[], None],
        layout: WeightLayout | None = None,
    ) -> None:
        self._storages, self._loaded, self._on_finish, self._layout = storages, loaded, on_finish, layout
        self._written = WrittenRegions()
        self._pieces = [
            replace(piece, dtype=str(storages[held.storage].dtype).removeprefix("torch."))
            for held in held_tensors(spec)
            for piece in held.pieces
        ]

    @property
    def layout(self) -> WeightLayout:
        """What every rank of the role holds."""
        assert self._layout is not None, "an engine outside a role has no layout"
        return self._layout

    def pieces(self) -> Sequence[Piece]:
        """All tensors of the checkpoint, whole."""
        return self._pieces

    def view(self, piece: Piece) -> Tensor:
        """A writable view of the region; from here until `finish` the engine has no valid weights."""
        self._loaded.begin()
        return strided_view(self._storages[piece.storage], piece)

    def writing(self) -> AbstractContextManager[None]:
        """Nothing is derived."""
        return nullcontext()

    def written(self, pieces: Sequence[Piece], proof: bool = True) -> None:
        """Count the regions as written. RuntimeError where one comes twice."""
        for piece in pieces:
            self._written.add(piece)

    def finish(self) -> None:
        """Every region was written once: forget the KV cache and let the engine generate.

        Raises RuntimeError naming the tensor otherwise.
        """
        written, self._written = self._written, WrittenRegions()
        written.check_complete(self._pieces)
        self._on_finish()
        self._loaded.finish()

    def discard(self) -> None:
        """Give up a transfer that failed; the engine has no valid weights until the next one succeeds."""
        self._written = WrittenRegions()
