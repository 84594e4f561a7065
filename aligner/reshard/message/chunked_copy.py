"""Copies on the CPU that are proven in the same pass: each chunk is compared while it is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL, c_size_t, c_ubyte, c_void_p
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 10
"""Source, copy and scratch of a chunk fit into an L2 of 1 MiB together."""

_libc = CDLL(None)
_libc.memcmp.argtypes = _libc.memcpy.argtypes = [c_void_p, c_void_p, c_size_t]
_libc.memcpy.restype = c_void_p


Done = Callable[[int], None]


def ignore(_: int) -> None:
    """The progress callback that does nothing."""


class Scratch:
    """Memory for a chunk, used over and over: memory from the allocator would cost a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._rooms = [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(3)]
        # A model has few shapes, and to cut a view takes as long as to fill 64 KiB.
        self._views: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def gathered(self, chunk: Tensor) -> Tensor:
        """The chunk's elements in a row; the chunk itself where they are."""
        return chunk if chunk.is_contiguous() else self._into(0, chunk, chunk.dtype)

    def cast(self, chunk: Tensor, dtype: torch.dtype) -> Tensor:
        """The chunk in a row and in another dtype. A cast of strided elements is not vectorised: they are gathered first."""
        chunk = self.gathered(chunk)
        return chunk if chunk.dtype == dtype else self._into(1, chunk, dtype)

    def held(self, chunk: Tensor) -> Tensor:
        """The chunk's elements in a row, elsewhere than what `gathered` and `cast` gave."""
        return chunk if chunk.is_contiguous() else self._into(2, chunk, chunk.dtype)

    def _into(self, room: int, chunk: Tensor, dtype: torch.dtype) -> Tensor:
        key = (room, chunk.shape, dtype)
        view = self._views.get(key)
        if view is None:
            bytes_ = self._rooms[room][: chunk.numel() * dtype.itemsize]
            view = self._views[key] = bytes_.view(dtype).view(chunk.shape)
        return view.copy_(chunk)


def copy(to: Tensor, read: Tensor, scratch: Scratch, done: Done = ignore) -> None:
    """Copy and cast a chunk at a time; `done` is told how many bytes of `to` are written so far."""
    if _plain(to, read):
        place, given, size = to.data_ptr(), read.data_ptr(), to.nbytes
        for start, count in _spans(size):
            _libc.memcpy(place + start, given + start, count)
            done(start + count)
        return
    written = 0
    for one, other in chunks(to, read):
        one.copy_(other if one.dtype == other.dtype else scratch.gathered(other))
        written += one.nbytes
        done(written)


def copy_proven(to: Tensor, again: Tensor, read: Tensor, scratch: Scratch, done: Done = ignore) -> bool:
    """Copy and cast as `copy` does; False where `again` does not hold what was written, to the last bit."""
    same, written = True, 0
    if _plain(to, again, read):
        place, look, given, size = to.data_ptr(), again.data_ptr(), read.data_ptr(), to.nbytes
        for start, count in _spans(size):
            _libc.memcpy(place + start, given + start, count)
            same = _libc.memcmp(look + start, given + start, count) == 0 and same
            done(start + count)
        return same
    for one, back, other in chunks(to, again, read):
        cast = scratch.cast(other, one.dtype)
        one.copy_(cast)
        same = _libc.memcmp(scratch.held(back).data_ptr(), cast.data_ptr(), cast.nbytes) == 0 and same
        written += one.nbytes
        done(written)
    return same


def copy_seen(to: Tensor, again: Tensor, read: Tensor, scratch: Scratch, see: Callable[[memoryview], None]) -> None:
    """Copy and cast as `copy` does; `see` is given the bytes that `again` then holds, in order, a chunk at a time."""
    if _plain(to, again, read):
        place, given, held = to.data_ptr(), read.data_ptr(), bytes_of(again)
        for start, count in _spans(len(held)):
            _libc.memcpy(place + start, given + start, count)
            see(held[start : start + count])
        return
    if not on_cpu((to, again, read)):
        copy(to, read, scratch)
        see(bytes_of(again.contiguous().cpu()))
        return
    for one, back, other in chunks(to, again, read):
        one.copy_(scratch.cast(other, one.dtype))
        see(bytes_of(scratch.held(back)))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; torch's own way takes five times as long."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    data: Any = (c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    data.tensor = tensor  # lives as long as its bytes
    return memoryview(data)


def _spans(size: int) -> Iterator[tuple[int, int]]:
    """Where each chunk of so many bytes in a row begins, and its bytes."""
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(CHUNK_BYTES, size - start)


def _plain(first: Tensor, *others: Tensor) -> bool:
    """Bytes in a row on the CPU: the C library copies them. To cut and copy a chunk takes torch some 8 us more."""
    return all(
        tensor.is_contiguous() and tensor.dtype == first.dtype and tensor.device.type == "cpu"
        for tensor in (first, *others)
    )


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as views of at most 128 KiB of the widest, in row-major order; whole on CUDA."""
    first = tensors[0]
    most = CHUNK_BYTES // max(tensor.element_size() for tensor in tensors)
    if first.numel() <= most or not on_cpu(tensors):
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(most) for tensor in tensors), strict=True)
    elif first.numel() // first.shape[0] > most:
        for rows in zip(*tensors, strict=True):
            yield from chunks(*rows)
    else:
        count = most // (first.numel() // first.shape[0])
        yield from zip(*(tensor.split(count) for tensor in tensors), strict=True)


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
