"""Names and regions: which box of which logical tensor a local storage holds (pure arithmetic, no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NamedTuple

ELEMENT_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Bytes of an element of the data types that models compute in."""
FP8 = "float8_e4m3fn"
STORED_BYTES = MappingProxyType({**ELEMENT_BYTES, FP8: 1})
"""Bytes of an element of the data types that weights are kept in."""


class Box(NamedTuple):
    """An axis-aligned region of a logical tensor: elements lo[i] <= index[i] < lo[i] + size[i] in every dimension."""

    lo: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.size)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{low}:{low + extent}" for low, extent in zip(self.lo, self.size, strict=True)) + "]"


@dataclass(frozen=True, init=False)
class Piece:
    """One box of a logical tensor (named and shaped as in the HF checkpoint), a strided view of one local storage."""

    name: str
    """Logical tensor, e.g. "model.layers.0.self_attn.q_proj.weight"."""
    lo: tuple[int, ...]
    """First element of the box, per dimension."""
    size: tuple[int, ...]
    """Extent of the box, per dimension."""
    storage: str
    """Local storage name: Megatron parameter, vLLM "module.path:param", or tensor of a Hugging Face file."""
    offset: int
    """Elements from the start of the local storage to the box's first element."""
    stride: tuple[int, ...]
    """Element strides in local storage, per dimension of the box."""
    dtype: str
    """Data type of the local storage, of `STORED_BYTES`."""

    def __init__(
        self,
        name: str,
        lo: tuple[int, ...],
        size: tuple[int, ...],
        storage: str,
        offset: int,
        stride: tuple[int, ...],
        dtype: str,
    ) -> None:
        assert len(lo) == len(size) == len(stride), f"{name}: ranks of lo, size and stride differ"
        assert dtype in STORED_BYTES, f"{name}: dtype {dtype} is none of {', '.join(STORED_BYTES)}"
        # Plans make a million of these; a frozen dataclass sets its fields three times slower.
        fields = self.__dict__
        fields["name"] = name
        fields["lo"] = lo
        fields["size"] = size
        fields["storage"] = storage
        fields["offset"] = offset
        fields["stride"] = stride
        fields["dtype"] = dtype

    @property
    def box(self) -> Box:
        return Box(self.lo, self.size)

    @property
    def elements(self) -> int:
        return prod(self.size)

    @property
    def bytes(self) -> int:
        return prod(self.size) * STORED_BYTES[self.dtype]

    def crop(self, lo: tuple[int, ...], size: tuple[int, ...]) -> Piece:
        """The part of this piece that holds the box (lo, size), given in the logical tensor's coordinates."""
        if lo == self.lo and size == self.size:
            return self
        offset = self.offset
        for own_lo, own_extent, low, extent, step in zip(self.lo, self.size, lo, size, self.stride, strict=True):
            assert own_lo <= low and low + extent <= own_lo + own_extent, (
                f"{self.name}: {Box(lo, size)} is not in {self.box}"
            )
            offset += (low - own_lo) * step
        return Piece(self.name, lo, size, self.storage, offset, self.stride, self.dtype)


Layout = Sequence[Piece]


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Element strides of a contiguous tensor of this shape."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def whole_tensor(name: str, shape: tuple[int, ...], dtype: str) -> Piece:
    """The piece of a rank that holds a whole logical tensor in a contiguous storage of the same name."""
    return Piece(name, (0,) * len(shape), shape, name, 0, contiguous_stride(shape), dtype)


def intersect(a: Box | Piece, b: Box | Piece) -> Box | None:
    """The common box of two boxes of one logical tensor; None where they share no element."""
    lo: list[int] = []
    size: list[int] = []
    for a_lo, a_size, b_lo, b_size in zip(a.lo, a.size, b.lo, b.size, strict=True):
        low = a_lo if a_lo > b_lo else b_lo
        extent = min(a_lo + a_size, b_lo + b_size) - low
        if extent <= 0:
            return None
        lo.append(low)
        size.append(extent)
    return Box(tuple(lo), tuple(size))


def subtract(box: Box, hole: Box) -> Iterator[Box]:
    """What is left of `box` without `hole` (a box inside it): at most two slabs per dimension, disjoint."""
    lo, size = list(box.lo), list(box.size)
    for dim, (low, extent) in enumerate(zip(hole.lo, hole.size, strict=True)):
        before, after = low - lo[dim], lo[dim] + size[dim] - low - extent
        assert before >= 0 and after >= 0, f"{hole} is not inside {box}"
        if before:
            yield Box(tuple(lo), (*size[:dim], before, *size[dim + 1 :]))
        if after:
            yield Box((*lo[:dim], low + extent, *lo[dim + 1 :]), (*size[:dim], after, *size[dim + 1 :]))
        lo[dim], size[dim] = low, extent
