"""One message: a proof, and the items' elements packed in the destination's dtype; and copies that need no message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL, c_size_t, c_void_p
from hashlib import blake2b

import torch
from torch import Tensor

from aligner.reshard.checksum import ROW_WORDS, Checksum, RowSums
from aligner.reshard.kernels import kernels_of
from aligner.reshard.plan import Item
from aligner.reshard.region import Piece

_OK, _FAILED = 0, 1
_ALIGN_WORDS = 8  # the payload starts on a cache line
_SLAB_BYTES = 512 << 10  # copied, then summed and compared while it is in L2
_BITS = {2: torch.int16, 4: torch.int32}
_MESSAGE = "the message does not hold what {source} held"
_STORAGE = "after the write {destination} does not hold what {source} held"
_memcmp = CDLL(None).memcmp
_memcmp.argtypes = [c_void_p, c_void_p, c_size_t]

View = Callable[[Piece], Tensor]
"""Gives a piece of this rank's storages as a strided view of shape `piece.size`."""


class Buffers:
    """Message buffers, used again within a transfer, and between transfers by whoever keeps them.

    Fresh memory costs a page fault every 4 KiB written. What is kept is at most what a transfer takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.checksum, self.kernels = Checksum(device), kernels_of(device)
        self.transfer = 0
        """Number of the transfer at hand, equal on all its ranks: a message of another one is refused."""
        self._spare: list[Tensor] = []

    def take(self, words: int) -> Tensor:
        """A buffer of at least `words` 64-bit words: the smallest spare one that is large enough, else a new one."""
        fits = [place for place, spare in enumerate(self._spare) if spare.numel() >= words]
        if fits:
            return self._spare.pop(min(fits, key=lambda place: self._spare[place].numel()))
        if self._spare:
            self._spare.pop()  # outgrown: the new one takes its place, so that the spares stay few
        return torch.empty(words, dtype=torch.int64, device=self.device)

    def give(self, bucket: Bucket) -> None:
        """Take back the buffer of a bucket that was sent or applied."""
        self._spare.append(bucket.buffer)


class Bucket:
    """64-bit words laid out as [status, identity of transfer and items, a sum per 16 KiB of payload | payload].

    The payload holds the items one after the other, each padded to whole words. `words` is what travels; it may be
    relayed as it is to ranks that want the same regions.
    """

    def __init__(self, items: Sequence[Item], buffers: Buffers) -> None:
        self.items = tuple(items)
        self._checksum, self._kernels, self._transfer = buffers.checksum, buffers.kernels, buffers.transfer
        self.payload_bytes = 0
        """Bytes of the items, the padding between them left out."""
        self._bounds = [0]
        for item in self.items:
            size = item.bytes
            self.payload_bytes += size
            self._bounds.append(self._bounds[-1] + (size + 7) // 8)
        rows = -(-self._bounds[-1] // ROW_WORDS)
        header = -(-(2 + rows) // _ALIGN_WORDS) * _ALIGN_WORDS
        self.buffer = buffers.take(header + rows * ROW_WORDS)
        self.words = self.buffer[: header + self._bounds[-1]]
        self.header, self.payload = self.words[:header], self.words[header:]
        self.delta: Tensor | None = None
        """The bytes that stand for `words` on the wire, where they are fewer."""
        self._sums = self.buffer[2 : 2 + rows]
        self._payload = self.buffer[header : header + rows * ROW_WORDS]
        self._payload[self._bounds[-1] :] = 0  # the last row is summed as a whole on both sides

    def pack(self, source: View, proof: bool) -> None:
        """Read every item from the source and cast it; with `proof`, sum what was cast while it is in the cache."""
        views = _views(source, self.items, from_source=True)
        if self._kernels is not None and self._near(views):
            dtypes = [_dtype(item.destination) for item in self.items]
            self._kernels.pack(views, dtypes, self._payload, self._bounds, self._sums)
        else:
            self._pack(views, proof)
        self.words[0], self.words[1] = _OK, self._identity() if proof else 0

    def _pack(self, views: Sequence[Tensor], proof: bool) -> None:
        sums = RowSums(self._checksum, self._payload) if proof else None
        for number, item in enumerate(self.items):
            start = self._bounds[number]
            if item.bytes % 8:
                self._payload[self._bounds[number + 1] - 1] = 0  # padding takes part in the sums
            written = 0
            for packed, read in _slabs(self._elements(number), views[number]):
                _copy(packed, read)
                written += packed.nbytes
                if sums is not None:
                    sums.written(start + written // 8)
        if sums is not None:
            self._sums.copy_(sums.finish())

    def land(self, view: View, by: int, to: int, proof: bool) -> None:
        """Write what rank `by` packed into the storages of rank `to`; with `proof` nothing is believed.

        Then RuntimeError says which item first: where the message is not about these items (nothing is written), is
        not word for word what was packed, or where the storages, looked up again, do not hold it bit for bit (a NaN
        equals itself, -0.0 is not 0.0). On the CPU each slab is written, summed and compared while it is in the cache,
        so nothing may overwrite it later: see `storage.check_disjoint`.
        """
        if proof and self.words[:2].tolist() != [_OK, self._identity()]:
            told = f"{len(self.items)} regions from {self.items[0]} on" if self.items else "no regions"
            raise RuntimeError(
                f"reshard: the message from rank {by} to rank {to} is not one of {told} in this transfer"
            )
        held = _views(view, self.items)
        again = _views(view, self.items) if proof else held
        if not proof:
            self._write(held)
        elif _on_cpu([*held, *again, self.words]):
            sums, differing = self._land_slabs(held, again)
            self._settle(sums, differing, by, to)
        else:
            self._settle((self._kernels or self._checksum).rows(self._payload), [], by, to)
            self._write(held)
            self._settle(self._sums, self._differing(again), by, to)

    def _land_slabs(self, held: Sequence[Tensor], again: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Writes; gives the sums of the message, and which items the storages do not hold."""
        sums, differing = RowSums(self._checksum, self._payload), []
        for number, views in enumerate(zip(held, again, strict=True)):
            elements, done, same = self._elements(number), self._bounds[number] * 8, True
            for written, read, packed in _slabs(*views, elements):
                written.copy_(packed)
                same = _same(read, packed) and same
                done += packed.nbytes
                sums.written(done // 8)
            if not same:
                differing.append(number)
        return sums.finish(), differing

    def _write(self, held: Sequence[Tensor]) -> None:
        if self._kernels is not None and self._near(held):
            self._kernels.unpack(held, self._payload, self._bounds)
        else:
            for number, written in enumerate(held):
                written.copy_(self._elements(number))

    def _differing(self, held: Sequence[Tensor]) -> list[int]:
        if self._kernels is not None and self._near(held):
            found = self._kernels.differs(held, self._payload, self._bounds)
            return found.nonzero().view(-1).tolist()
        return _differing([(read, self._elements(number)) for number, read in enumerate(held)])

    def _settle(self, sums: Tensor, differing: Sequence[int], by: int, to: int) -> None:
        """RuntimeError where the message is wrong, or else where the storages are."""
        wrong = (sums != self._sums).nonzero().view(-1).tolist()
        if wrong:
            touched = [number for number in range(len(self.items)) if self._overlaps(number, wrong)]
            raise _mismatch(self.items, touched, by, to, _MESSAGE)
        if differing:
            raise _mismatch(self.items, differing, by, to, _STORAGE)

    def mark_failed(self) -> None:
        """Tell the receiver not to use this bucket."""
        self.words[0] = _FAILED

    def failed(self) -> bool:
        return int(self.words[0]) != _OK

    def _near(self, views: Sequence[Tensor]) -> bool:
        return all(view.device == self.words.device for view in views)

    def _identity(self) -> int:
        """64 bits that stand for which transfer and which regions, in which order and dtype, the message is about."""
        told = f"{self._transfer};" + ";".join(
            f"{item.name}{item.lo}{item.size}{item.destination.dtype}" for item in self.items
        )
        return int.from_bytes(blake2b(told.encode(), digest_size=8).digest(), "little", signed=True)

    def _elements(self, number: int) -> Tensor:
        item = self.items[number]
        words = self._payload[self._bounds[number] : self._bounds[number + 1]]
        return words.view(_dtype(item.destination))[: item.destination.elements].view(item.size)

    def _overlaps(self, number: int, rows: Sequence[int]) -> bool:
        start, end = self._bounds[number], self._bounds[number + 1]
        return any(start < (row + 1) * ROW_WORDS and end > row * ROW_WORDS for row in rows)


def copy_local(items: Sequence[Item], source: View, view: View, rank: int, proof: bool) -> None:
    """Copy and cast from storage to storage on one rank, without a message.

    With `proof` the destinations, looked up again, are compared bit for bit with what was written: on the CPU each slab
    while it is in the cache. All of it takes a few slabs (512 KiB) of extra memory there. RuntimeError names the first
    that differs.
    """
    reads, held = _views(source, items, from_source=True), _views(view, items)
    again = _views(view, items) if proof else held
    if proof and _on_cpu([*reads, *held, *again]):
        wrong = [n for n, views in enumerate(zip(held, again, reads, strict=True)) if not _copy_proven(*views)]
    else:
        for written, read in zip(held, reads, strict=True):
            for one, other in _slabs(written, read):
                _copy(one, other)
        wrong = _differing(list(zip(again, reads, strict=True))) if proof else []
    if wrong:
        raise _mismatch(items, wrong, rank, rank, _STORAGE)


def _copy_proven(held: Tensor, again: Tensor, source: Tensor) -> bool:
    """Copies and casts on the CPU, a slab at a time; False where `again` does not hold what was written."""
    same = True
    for written, read, taken in _slabs(held, again, source):
        cast = taken.contiguous().to(written.dtype)
        written.copy_(cast)
        same = _same(read, cast) and same
    return same


def _same(held: Tensor, expected: Tensor) -> bool:
    """Whether a slab on the CPU holds these contiguous elements, by the C library: `torch.equal` is a third as fast."""
    held = held.contiguous()
    return _memcmp(held.data_ptr(), expected.data_ptr(), held.nbytes) == 0


def _differing(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Which of the pairs (held, expected) differ in any bit, once `expected` is cast to the dtype of what is held."""
    # One look at all: each would wait for the device.
    found = [_bits(held) != _bits(expected.to(held.device, held.dtype)) for held, expected in pairs]
    return torch.stack([differ.any() for differ in found]).nonzero().view(-1).tolist() if found else []


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _copy(to: Tensor, read: Tensor) -> None:
    """One slab, cast: a cast of strided elements is not vectorised on the CPU, so they are gathered first."""
    near = to.device.type == "cpu" and to.dtype != read.dtype
    to.copy_(read.contiguous() if near else read)


def _slabs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as views of at most 512 KiB of the first, in row-major order; whole on CUDA."""
    first = tensors[0]
    most = _SLAB_BYTES // first.element_size()
    if first.numel() <= most or not _on_cpu(tensors):
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(most) for tensor in tensors), strict=True)
    elif first.numel() // first.shape[0] > most:
        for rows in zip(*tensors, strict=True):
            yield from _slabs(*rows)
    else:
        count = most // (first.numel() // first.shape[0])
        yield from zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _views(view: View, items: Sequence[Item], from_source: bool = False) -> list[Tensor]:
    found = [view(item.source if from_source else item.destination) for item in items]
    for item, tensor in zip(items, found, strict=True):
        assert tensor.shape == item.size, f"{item}: got a view of shape {tuple(tensor.shape)}"
    return found


def _mismatch(items: Sequence[Item], wrong: Sequence[int], by: int, to: int, what: str) -> RuntimeError:
    item = items[wrong[0]]
    told = what.format(source=item.source.storage, destination=item.destination.storage)
    return RuntimeError(
        f"reshard: checksum mismatch in {item} from rank {by} to rank {to}: {told} "
        f"({len(wrong)} of {len(items)} regions in this bucket differ)"
    )


def _dtype(piece: Piece) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, piece.dtype)
    return dtype
