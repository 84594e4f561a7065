"""Layouts of weights that are quantized in blocks: FP8 tensors with their scales in place of 16- or 32-bit ones (pure arithmetic, no torch).

The scales of tensor X are tensor X_scale_inv, as in DeepSeek-V3's checkpoints: one float32 for each block of 128 x 128.
A block's scale depends on all of its elements, so a rank at either end must hold whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.region import FP8, Box, Piece, contiguous_stride

BLOCK = 128
"""Rows and columns of a block that shares a scale."""
SCALE_SUFFIX = "_scale_inv"

Shapes = Mapping[str, tuple[int, ...]]


def scale_shapes(quantized: Shapes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the scales of these tensors."""
    return {
        f"{name}{SCALE_SUFFIX}": tuple(-(-extent // BLOCK) for extent in shape) for name, shape in quantized.items()
    }


class _QuantizedLayout:
    """A layout of which some tensors are quantized.

    Args:
        plain: the layout in the dtype of computation.
        quantized: name -> shape of the tensors that are quantized, all of two dimensions.
        setting: what chose that, for errors.
        owner: whose ranks these are, for errors.
    """

    def __init__(self, plain: WeightLayout, quantized: Shapes, setting: str, owner: str = "a rank") -> None:
        self.plain, self.quantized, self._setting, self._owner = plain, quantized, setting, owner
        self._scaled = {f"{name}{SCALE_SUFFIX}": name for name in quantized}

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks that hold something, ascending."""
        return self.plain.ranks

    def layout(self, rank: int) -> Sequence[Piece]:
        """Everything that one rank holds. Raises ValueError where that cuts a block."""
        return self.pieces(self.plain.layout(rank))

    def pieces(self, held: Sequence[Piece]) -> list[Piece]:
        """What a rank that holds `held` of the plain layout holds of this one. Raises ValueError where that cuts a block."""
        by_name: dict[str, list[Piece]] = {}
        for piece in held:
            by_name.setdefault(piece.name, []).append(piece)
        made: list[Piece] = []
        for name, pieces in by_name.items():
            made += self._quantize(pieces) if name in self.quantized else pieces
        return made

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """Every distinct piece of one tensor with the ranks that hold it in that very form, ascending."""
        tensor = self._scaled.get(name, name)
        if tensor not in self.quantized:
            return self.plain.holders(name)
        by_rank: dict[int, list[Piece]] = {}
        for piece, ranks in self.plain.holders(tensor):
            for rank in ranks:
                by_rank.setdefault(rank, []).append(piece)
        ranks_of: dict[tuple[Piece, ...], list[int]] = {}
        for rank in sorted(by_rank):
            ranks_of.setdefault(tuple(by_rank[rank]), []).append(rank)
        holders: dict[Piece, set[int]] = {}
        for pieces, members in ranks_of.items():
            for piece in self._quantize(pieces):
                if piece.name == name:
                    holders.setdefault(piece, set()).update(members)
        return [(piece, tuple(sorted(owners))) for piece, owners in holders.items()]

    def check(self) -> None:
        """Raises ValueError, the same on every rank, where a rank's part cuts a block."""
        for name in self.quantized:
            self.holders(name)

    def _quantize(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The FP8 pieces of a tensor and those of its scales, of a rank that holds `pieces` of it."""
        raise AssertionError("of the two ends")

    def _check_whole_blocks(self, name: str, box: Box) -> None:
        if any(low % BLOCK or extent % BLOCK for low, extent in zip(box.lo, box.size, strict=True)):
            raise ValueError(
                f"{self._setting} scales blocks of {BLOCK} x {BLOCK} weights, and {self._owner} with {name}{box} of "
                f"{'x'.join(map(str, self.quantized[name]))} would hold a part of one; use fewer ranks for the "
                "tensor, so that each holds whole blocks, or leave the setting out."
            )


class QuantizedSource(_QuantizedLayout):
    """A source that is quantized as it is packed. Its quantized pieces are views of no storage: they are computed.

    What a rank holds of a tensor in several storages, or in several places of one (the heads of Megatron's fused projection),
    counts as one box where it makes one.
    """

    def _quantize(self, pieces: Sequence[Piece]) -> list[Piece]:
        made: list[Piece] = []
        for box in _joined([piece.box for piece in pieces]):
            name = pieces[0].name
            self._check_whole_blocks(name, box)
            made.append(_computed(name, box, FP8))
            made.append(_computed(f"{name}{SCALE_SUFFIX}", in_blocks(box), "float32"))
        return made


class QuantizedDestination(_QuantizedLayout):
    """A destination that keeps FP8 weights where the plain ones were, and their scales in a storage of their own."""

    def _quantize(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [made for piece in pieces for made in self._with_scales(piece)]

    def _with_scales(self, piece: Piece) -> Iterator[Piece]:
        self._check_whole_blocks(piece.name, piece.box)
        width = piece.stride[0]  # of the storage, which stacks rows of one width
        row, column = divmod(piece.offset, width)
        self._check_whole_blocks(piece.name, Box((row, column), (width, width)))
        yield Piece(piece.name, piece.lo, piece.size, piece.storage, piece.offset, piece.stride, FP8)
        box, columns = in_blocks(piece.box), width // BLOCK
        offset = row // BLOCK * columns + column // BLOCK
        storage = f"{piece.storage}{SCALE_SUFFIX}"
        stride = (
            columns if box.size[0] > 1 else 1,
            1,
        )  # as a dry run of loaders has it, which sees no step where there is one row
        yield Piece(f"{piece.name}{SCALE_SUFFIX}", box.lo, box.size, storage, offset, stride, "float32")


def in_blocks(box: Box) -> Box:
    """A box of whole blocks, counted in blocks."""
    return Box(tuple(low // BLOCK for low in box.lo), tuple(extent // BLOCK for extent in box.size))


def around(box: Box) -> Box:
    """The smallest box of whole blocks that holds `box`."""
    starts = tuple(low // BLOCK * BLOCK for low in box.lo)
    ends = [-(-(low + extent) // BLOCK) * BLOCK for low, extent in zip(box.lo, box.size, strict=True)]
    return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def _joined(boxes: Sequence[Box]) -> list[Box]:
    """The boxes, those that continue each other's rows as one."""
    joined: list[Box] = []
    for box in sorted(set(boxes), key=lambda box: (box.lo[1], box.size[1], box.lo[0])):
        last = joined[-1] if joined else None
        if last and (last.lo[1], last.size[1]) == (box.lo[1], box.size[1]) and last.lo[0] + last.size[0] == box.lo[0]:
            joined[-1] = Box(last.lo, (last.size[0] + box.size[0], last.size[1]))
        else:
            joined.append(box)
    return joined


def _computed(name: str, box: Box, dtype: str) -> Piece:
    return Piece(name, box.lo, box.size, name, 0, contiguous_stride(box.size), dtype)
