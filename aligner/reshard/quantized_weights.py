"""`QuantizedWeights`: the source of a transfer to weights in FP8, which casts what it is asked for as a message is packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from aligner.reshard.message.quantize import block_scales, quantize_blocks
from aligner.reshard.plan.block_scales import BLOCK, SCALE_SUFFIX, QuantizedSource, Shapes, around
from aligner.reshard.plan.region import FP8, Box, Piece, intersect
from aligner.reshard.weights import ShardedWeights


class QuantizedWeights:
    """A source, some tensors of which are given in FP8 with a scale for each block, straight from their training dtype.

    The cast is a pass of its own over what a message holds, in front of the one that packs it: on CUDA one launch for each
    region. Each block is cast as a whole wherever regions and messages are cut; ranks that hold the same weights give the same bits.

    Args:
        plain: the weights in their training dtype.
        quantized: name -> shape of the tensors that are quantized, all of two dimensions.
        setting: what chose that, for errors.

    Raises:
        ValueError: a rank holds a part of a block; on every rank of the world.
    """

    def __init__(self, plain: ShardedWeights, quantized: Shapes, setting: str) -> None:
        self._plain = plain
        self.layout = QuantizedSource(plain.layout, quantized, setting)
        """What each rank gives."""
        self.layout.check()

    def pieces(self) -> Sequence[Piece]:
        """What this rank gives."""
        return self.layout.pieces(self._plain.pieces())

    def view(self, piece: Piece) -> Tensor:
        """The piece: of a quantized tensor newly computed, in memory of its own."""
        if piece.dtype == FP8:
            box = around(piece.box)
            fp8, _ = quantize_blocks(self._held(piece.name, box))
            starts = [low - start for low, start in zip(piece.lo, box.lo, strict=True)]
            return fp8.narrow(0, starts[0], piece.size[0]).narrow(1, starts[1], piece.size[1])
        name = piece.name.removesuffix(SCALE_SUFFIX)
        if name == piece.name or name not in self.layout.quantized:
            return self._plain.view(piece)
        blocks = Box(tuple(low * BLOCK for low in piece.lo), tuple(extent * BLOCK for extent in piece.size))
        return block_scales(self._held(name, blocks))

    @cached_property
    def _by_name(self) -> dict[str, list[Piece]]:
        by_name: dict[str, list[Piece]] = {}
        for piece in self._plain.pieces():
            by_name.setdefault(piece.name, []).append(piece)
        return by_name

    def _held(self, name: str, box: Box) -> Tensor:
        """A box of a tensor in its training dtype: a view where one piece holds it, else put together."""
        parts = [(piece, part) for piece in self._by_name[name] if (part := intersect(piece, box))]
        views = [(part, self._plain.view(piece.crop(*part))) for piece, part in parts]
        for part, view in views:
            if part == box:
                return view.detach()
        whole = torch.empty(box.size, dtype=views[0][1].dtype, device=views[0][1].device)
        for part, view in views:
            row, column = (low - start for low, start in zip(part.lo, box.lo, strict=True))
            whole[row : row + part.size[0], column : column + part.size[1]] = view.detach()
        return whole
