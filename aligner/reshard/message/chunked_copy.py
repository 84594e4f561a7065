"""Copies on the CPU that are verified in the same pass: each chunk is compared while it is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL, c_size_t, c_ubyte, c_void_p
from typing import Any

import torch
from torch import Tensor

from aligner.reshard.message.checksum import StreamingHash, hash_of

CHUNK_BYTES = 256 << 10
"""Source, copy and buffers of a chunk fit into an L2 cache of 1 MiB together."""

_libc = CDLL(None)
_libc.memcmp.argtypes = _libc.memcpy.argtypes = [c_void_p, c_void_p, c_size_t]
_libc.memcpy.restype = c_void_p

Progress = Callable[[int], None]
"""Called with the number of bytes written so far."""


def no_progress(_: int) -> None:
    """The progress callback that does nothing."""


class ChunkBuffers:
    """Memory for the chunks of a copy, reused: fresh memory would cost a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(3)]
        # A model has few shapes, and making a view takes as long as filling 64 KiB.
        self._views: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def contiguous(self, chunk: Tensor) -> Tensor:
        """The chunk, contiguous; itself where it is."""
        return chunk if chunk.is_contiguous() else self._into(0, chunk, chunk.dtype)

    def cast(self, chunk: Tensor, dtype: torch.dtype) -> Tensor:
        """The chunk, contiguous and in another dtype. Casts of strided elements are not vectorised, so they are copied first."""
        chunk = self.contiguous(chunk)
        return chunk if chunk.dtype == dtype else self._into(1, chunk, dtype)

    def readback(self, chunk: Tensor) -> Tensor:
        """The chunk, contiguous, in other memory than what `contiguous` and `cast` returned."""
        return chunk if chunk.is_contiguous() else self._into(2, chunk, chunk.dtype)

    def _into(self, buffer: int, chunk: Tensor, dtype: torch.dtype) -> Tensor:
        key = (buffer, chunk.shape, dtype)
        view = self._views.get(key)
        if view is None:
            bytes_ = self._buffers[buffer][: chunk.numel() * dtype.itemsize]
            view = self._views[key] = bytes_.view(dtype).view(chunk.shape)
        return view.copy_(chunk)


def copy(target: Tensor, source: Tensor, chunk_buffers: ChunkBuffers, progress: Progress = no_progress) -> None:
    """Copy and cast a chunk at a time; `progress` gets the number of bytes of `target` written so far."""
    if plain(target.dtype, target, source):
        copy_bytes(target.data_ptr(), source.data_ptr(), target.nbytes, progress)
        return
    written = 0
    for target_chunk, source_chunk in chunk_views(target, source):
        same_dtype = target_chunk.dtype == source_chunk.dtype
        target_chunk.copy_(source_chunk if same_dtype else chunk_buffers.contiguous(source_chunk))
        written += target_chunk.nbytes
        progress(written)


def copy_verified(
    target: Tensor, readback: Tensor, source: Tensor, chunk_buffers: ChunkBuffers, progress: Progress = no_progress
) -> bool:
    """Copy and cast as `copy` does; False where `readback` does not hold what was written, to the last bit."""
    if plain(target.dtype, target, readback, source):
        addresses = target.data_ptr(), readback.data_ptr(), source.data_ptr()
        return copy_bytes_verified(*addresses, target.nbytes, progress)
    if not on_cpu((target, readback, source)):
        copy(target, source, chunk_buffers, progress)
        held, expected = (tensor.contiguous().cpu() for tensor in (readback, source.to(target.dtype)))
        return _libc.memcmp(held.data_ptr(), expected.data_ptr(), held.nbytes) == 0
    same, written = True, 0
    for target_chunk, readback_chunk, source_chunk in chunk_views(target, readback, source):
        cast = chunk_buffers.cast(source_chunk, target_chunk.dtype)
        target_chunk.copy_(cast)
        read_again = chunk_buffers.readback(readback_chunk)
        same = _libc.memcmp(read_again.data_ptr(), cast.data_ptr(), cast.nbytes) == 0 and same
        written += target_chunk.nbytes
        progress(written)
    return same


def copy_hashed(target: Tensor, readback: Tensor, source: Tensor, chunk_buffers: ChunkBuffers) -> int:
    """Copy and cast as `copy` does; returns `hash_of` the bytes that `readback` then holds, in order."""
    if plain(target.dtype, target, readback, source):
        return copy_bytes_hashed(target.data_ptr(), source.data_ptr(), bytes_of(readback))
    if not on_cpu((target, readback, source)):
        copy(target, source, chunk_buffers)
        return hash_of(bytes_of(readback.contiguous().cpu()))
    read_back = StreamingHash()
    for target_chunk, readback_chunk, source_chunk in chunk_views(target, readback, source):
        target_chunk.copy_(chunk_buffers.cast(source_chunk, target_chunk.dtype))
        read_back.add(bytes_of(chunk_buffers.readback(readback_chunk)))
    return read_back.finish()


def copy_bytes(to: int, origin: int, size: int, progress: Progress = no_progress) -> None:
    """`copy` of `size` contiguous bytes between two addresses."""
    if size <= CHUNK_BYTES:
        _libc.memcpy(to, origin, size)
        progress(size)
        return
    for start, count in _spans(size):
        _libc.memcpy(to + start, origin + start, count)
        progress(start + count)


def copy_bytes_verified(to: int, back: int, origin: int, size: int, progress: Progress = no_progress) -> bool:
    """`copy_verified` of `size` contiguous bytes between addresses, read back at `back`."""
    if size <= CHUNK_BYTES:
        _libc.memcpy(to, origin, size)
        progress(size)
        return bool(_libc.memcmp(back, origin, size) == 0)
    same = True
    for start, count in _spans(size):
        _libc.memcpy(to + start, origin + start, count)
        same = _libc.memcmp(back + start, origin + start, count) == 0 and same
        progress(start + count)
    return same


def copy_bytes_hashed(to: int, origin: int, stored: memoryview) -> int:
    """Copies contiguous bytes between two addresses; returns `hash_of` what is read back from `stored`."""
    size = len(stored)
    if size <= 2 * CHUNK_BYTES:  # in one call the hash is faster, and all of it is still in the cache
        _libc.memcpy(to, origin, size)
        return hash_of(stored)
    read_back = StreamingHash()
    for start, count in _spans(size):
        _libc.memcpy(to + start, origin + start, count)
        read_back.add(stored[start : start + count])
    return read_back.finish()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; torch's own way takes five times as long."""
    assert tensor.is_contiguous() and tensor.is_cpu
    data: Any = (c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    data.tensor = tensor  # lives as long as its bytes
    return memoryview(data)


def _spans(size: int) -> Iterator[tuple[int, int]]:
    """Start and number of bytes of each chunk of `size` contiguous bytes."""
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(CHUNK_BYTES, size - start)


def plain(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Contiguous on the CPU and of this dtype: the C library copies them; torch takes some 8 us more for each chunk."""
    for tensor in tensors:  # noqa: SIM110  (asked of every region: a generator would take twice as long)
        if not (tensor.is_contiguous() and tensor.dtype == dtype and tensor.is_cpu):
            return False
    return True


def chunk_views(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as views of at most 128 KiB of the widest, in row-major order; whole on CUDA."""
    first = tensors[0]
    most = CHUNK_BYTES // max(tensor.element_size() for tensor in tensors)
    if first.numel() <= most or not on_cpu(tensors):
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(most) for tensor in tensors), strict=True)
    elif first.numel() // first.shape[0] > most:
        for rows in zip(*tensors, strict=True):
            yield from chunk_views(*rows)
    else:
        count = most // (first.numel() // first.shape[0])
        yield from zip(*(tensor.split(count) for tensor in tensors), strict=True)


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_cpu for tensor in tensors)
