"""Triton kernels: a bucket packed, summed, unpacked and compared in one launch each, by the arithmetic of the CPU.

A launch handles all items of a bucket that share their two dtypes. A bucket may hold a thousand biases, and a launch
for each would cost more than their bytes; so the host writes a table of segments, the parts of items that lie in one
row of 16 KiB, and one program takes one segment. A sum is linear in its bytes: segments add theirs to their
row's sum atomically, and since integers wrap, the order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligner.reshard.message.checksum import CELL_BYTES, CELLS, COLUMNS, ROW_WORDS, weights

_TILE = 1024
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_CELL, _CELLS, _COLUMNS = tl.constexpr(CELL_BYTES), tl.constexpr(CELLS), tl.constexpr(COLUMNS)
_ROW_BYTES = tl.constexpr(ROW_WORDS * 8)
_PACK, _UNPACK, _COMPARE = 0, 1, 2


class Kernels:
    """The kernels of one device, with the weights of the sums."""

    def __init__(self, device: torch.device) -> None:
        byte, cell = weights(device)
        self._byte, self._cell = byte.contiguous(), cell.contiguous()

    def pack(
        self,
        views: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        payload: Tensor,
        bounds: Sequence[int],
        sums: Tensor,
    ) -> None:
        """Views (up to any strides) cast into `payload` from word bounds[i] on; padding zeroed, row sums into `sums`."""
        sums.zero_()
        self._run(_PACK, views, dtypes, payload, bounds, sums)

    def unpack(self, views: Sequence[Tensor], payload: Tensor, bounds: Sequence[int]) -> None:
        """The payload's items into views of their own dtype."""
        self._run(_UNPACK, views, [view.dtype for view in views], payload, bounds, payload)

    def differs(self, views: Sequence[Tensor], payload: Tensor, bounds: Sequence[int]) -> Tensor:
        """Which views (items,) int32 do not hold the payload's bits; nothing waits for the device."""
        differs = torch.zeros(len(views), dtype=torch.int32, device=payload.device)
        self._run(_COMPARE, views, [view.dtype for view in views], payload, bounds, differs)
        return differs

    def rows(self, payload: Tensor) -> Tensor:
        """The sums (rows,) int64 of whole rows."""
        sums = torch.empty(payload.numel() // ROW_WORDS, dtype=torch.int64, device=payload.device)
        if len(sums):
            _row_sums[(len(sums),)](payload.view(torch.int32), sums, self._byte, self._cell, TILE=_TILE)
        return sums

    def _run(
        self,
        operation: int,
        views: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        payload: Tensor,
        bounds: Sequence[int],
        result: Tensor,
    ) -> None:
        order = sorted(range(len(views)), key=lambda n: (_KIND[views[n].dtype], _KIND[dtypes[n]]))
        for (held, packed), numbers in groupby(order, key=lambda n: (views[n].dtype, dtypes[n])):
            blocks = [
                (n, block.data_ptr(), *shape, block.numel(), start, end)
                for n in numbers
                for block, shape, start, end in _blocks(
                    views[n], bounds[n] * 8 // packed.itemsize, 8 // packed.itemsize
                )
            ]
            if blocks:
                table = torch.tensor(blocks, dtype=torch.int64)
                segments = _segments(table, ROW_WORDS * 8 // packed.itemsize)
                _move[(len(segments),)](
                    table.to(payload.device), segments.to(payload.device), payload.view(_BITS[packed.itemsize]), result,
                    self._byte, self._cell,
                    OPERATION=operation, HELD=_KIND[held], PACKED=_KIND[packed], FIELDS=table.shape[1], TILE=_TILE,
                )  # fmt: skip


def _segments(table: Tensor, per_row: int) -> Tensor:
    """(segments, 2): the block and the row of every part of a block that lies in one row."""
    start, end = table[:, -2], table[:, -1]
    low = start // per_row
    counts = (end - 1) // per_row - low + 1
    block = torch.repeat_interleave(torch.arange(len(table)), counts)
    row = torch.arange(len(block)) - (counts.cumsum(0) - counts - low)[block]
    return torch.stack((block, row), 1)


def _blocks(view: Tensor, start: int, per_word: int) -> Iterator[tuple[Tensor, tuple[int, ...], int, int]]:
    """An item's blocks of three dimensions: (block, (size 1, size 2, strides 0-2), first place, place after its padding)."""
    parts = list(_parts(view))
    for number, block in enumerate(parts):
        missing = 3 - block.dim()
        sizes, strides = (1,) * missing + tuple(block.shape), (0,) * missing + block.stride()
        end = start + block.numel()
        padded = -(-end // per_word) * per_word if number == len(parts) - 1 else end
        yield block, (*sizes[1:], *strides), start, padded
        start = end


def _parts(view: Tensor) -> Iterator[Tensor]:
    """`view` cut along its first dimensions until at most three remain."""
    if view.dim() <= 3:
        yield view
    elif view.stride(0) == view.stride(1) * view.shape[1]:
        yield from _parts(view.flatten(0, 1))
    else:
        for part in view:
            yield from _parts(part)


@triton.jit
def _weighted(
    bits: tl.tensor, place: tl.tensor, byte_weight: tl.tensor, cell_weight: tl.tensor, BYTES: tl.constexpr
) -> tl.tensor:
    """What elements, as int32 lanes at byte `place` of their row, add to the row's sum."""
    total = place.to(tl.int64) * 0
    for column in tl.static_range(_COLUMNS):
        inner = place * 0
        for byte in tl.static_range(BYTES):
            value = (bits << (24 - 8 * byte)) >> 24
            inner += value * tl.load(byte_weight + (place % _CELL + byte) * _COLUMNS + column).to(tl.int32)
        total += inner.to(tl.int64) * tl.load(cell_weight + column * _CELLS + place // _CELL % _CELLS)
    return total


@triton.jit
def _cast(bits: tl.tensor, HELD: tl.constexpr, PACKED: tl.constexpr) -> tl.tensor:
    """Bits of one dtype to bits of another, as int32; rounds to nearest, ties to even. 0: fp32, 1: bf16, 2: fp16; 3: fp8, to itself
    alone, since its scales are of whole blocks (`quantize_triton`)."""
    bits = bits.to(tl.int32)
    if HELD != PACKED:
        if HELD == 1:
            bits = bits << 16
        if HELD == 2:
            bits = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        if PACKED == 1:  # in integers: the interpreter's own cast truncates
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded)
        if PACKED == 2:
            bits = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def _move(
    table: tl.tensor, segments: tl.tensor, payload: tl.tensor, result: tl.tensor, byte_weight: tl.tensor, cell_weight: tl.tensor,
    OPERATION: tl.constexpr, HELD: tl.constexpr, PACKED: tl.constexpr, FIELDS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One segment: OPERATION is 0 to pack and sum, 1 to unpack, 2 to compare."""
    segment = segments + tl.program_id(0).to(tl.int64) * 2
    entry, row = table + tl.load(segment) * FIELDS, tl.load(segment + 1)
    number, address = tl.load(entry), tl.load(entry + 1)
    # An item fits 32 bits, in which division is several times cheaper.
    size1, size2 = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    stride0, stride1, stride2 = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    elements, start, end = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    storage = address.to(tl.pointer_type(tl.int32 if HELD == 0 else tl.int8 if HELD == 3 else tl.int16))
    BYTES: tl.constexpr = 4 if PACKED == 0 else 1 if PACKED == 3 else 2
    low = tl.maximum(start, row * (_ROW_BYTES // BYTES))
    high = tl.minimum(end, (row + 1) * (_ROW_BYTES // BYTES))
    total = tl.zeros((TILE,), dtype=tl.int64)
    for step in range(0, high - low, TILE):
        there = low + step + tl.arange(0, TILE)
        inside = there < high
        element = (there - start).to(tl.int32)
        real = inside & (element < elements)  # the rest is padding up to a whole word
        outer = element // size2
        at = storage + (outer // size1 * stride0 + outer % size1 * stride1 + element % size2 * stride2)
        packed = payload + there
        if OPERATION == 0:
            bits = _cast(tl.load(at, mask=real, other=0), HELD, PACKED)
            tl.store(packed, bits.to(payload.dtype.element_ty), mask=inside)
            place = (there * BYTES % _ROW_BYTES).to(tl.int32)
            total += _weighted(tl.where(inside, bits, 0), place, byte_weight, cell_weight, BYTES)
        if OPERATION == 1:
            tl.store(at, tl.load(packed, mask=real, other=0), mask=real)
        if OPERATION == 2:
            held, sent = tl.load(at, mask=real, other=0), tl.load(packed, mask=real, other=0)
            total += (held != sent).to(tl.int64)
    if OPERATION == 0:
        tl.atomic_add(result + row, tl.sum(total))
    if OPERATION == 2:
        tl.atomic_max(result + number, (tl.sum(total) > 0).to(tl.int32))


@triton.jit
def _row_sums(
    payload: tl.tensor, sums: tl.tensor, byte_weight: tl.tensor, cell_weight: tl.tensor, TILE: tl.constexpr
) -> None:
    """One row of a payload, read as int32."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), dtype=tl.int64)
    for step in range(0, _ROW_BYTES // 4, TILE):
        lane = step + tl.arange(0, TILE)
        total += _weighted(tl.load(payload + row * (_ROW_BYTES // 4) + lane), lane * 4, byte_weight, cell_weight, 4)
    tl.store(sums + row, tl.sum(total))
