"""One message: a proof, and the items' elements packed in the destination's dtype; and copies that need no message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from aligner.reshard.checksum import Checksum, Hashes, Running, Sums
from aligner.reshard.kernels import kernels_of
from aligner.reshard.plan import Item
from aligner.reshard.region import Piece
from aligner.reshard.slabs import Done, Scratch, copy, copy_proven, ignore, on_cpu

_OK, _FAILED = 0, 1
_ALIGN_WORDS = 8  # the payload starts on a cache line
_BITS = {2: torch.int16, 4: torch.int32}
_MESSAGE = "the message does not hold what {source} held"
_STORAGE = "after the write {destination} does not hold what {source} held"

View = Callable[[Piece], Tensor]
"""Gives a piece of this rank's storages as a strided view of shape `piece.size`."""


class Buffers:
    """Message buffers, used again within a transfer, and between transfers by whoever keeps them.

    Fresh memory costs a page fault every 4 KiB written. What is kept is at most what a transfer takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernels = kernels_of(device)
        # The kernels make the sums in the pass that packs.
        self.checksum: Checksum = Hashes() if device.type == "cpu" and self.kernels is None else Sums(device)
        self.scratch = Scratch()
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
    """64-bit words laid out as [status, identity of transfer and items, a checksum per row of payload | payload].

    The payload holds the items one after the other, each padded to whole words. `words` is what travels; it may be
    relayed as it is to ranks that want the same regions.
    """

    def __init__(self, items: Sequence[Item], buffers: Buffers) -> None:
        self.items = tuple(items)
        self._checksum, self._kernels, self._transfer = buffers.checksum, buffers.kernels, buffers.transfer
        self._scratch = buffers.scratch
        self.payload_bytes = 0
        """Bytes of the items, the padding between them left out."""
        self._bounds = [0]
        for item in self.items:
            size = item.bytes
            self.payload_bytes += size
            self._bounds.append(self._bounds[-1] + (size + 7) // 8)
        self._row_words = buffers.checksum.row_words
        rows = -(-self._bounds[-1] // self._row_words)
        header = -(-(2 + rows) // _ALIGN_WORDS) * _ALIGN_WORDS
        self.buffer = buffers.take(header + rows * self._row_words)
        self.words = self.buffer[: header + self._bounds[-1]]
        self.header, self.payload = self.words[:header], self.words[header:]
        self.delta: Tensor | None = None
        """The bytes that stand for `words` on the wire, where they are fewer."""
        self._sums = self.buffer[2 : 2 + rows]
        self._payload = self.buffer[header : header + rows * self._row_words]
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
        sums = self._checksum.start(self._payload) if proof else None
        for number, item in enumerate(self.items):
            start = self._bounds[number]
            if item.bytes % 8:
                self._payload[self._bounds[number + 1] - 1] = 0  # padding takes part in the sums
            done = ignore if sums is None else _told(sums, start)
            copy(self._elements(number), views[number], self._scratch, done)
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
        elif on_cpu([*held, *again, self.words]):
            sums, differing = self._land_slabs(held, again)
            self._settle(sums, differing, by, to)
        else:
            self._settle((self._kernels or self._checksum).rows(self._payload), [], by, to)
            self._write(held)
            self._settle(self._sums, self._differing(again), by, to)

    def _land_slabs(self, held: Sequence[Tensor], again: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Writes; gives the sums of the message, and which items the storages do not hold."""
        sums, differing = self._checksum.start(self._payload), []
        for number, (written, read) in enumerate(zip(held, again, strict=True)):
            done = _told(sums, self._bounds[number])
            if not copy_proven(written, read, self._elements(number), self._scratch, done):
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
        return any(start < (row + 1) * self._row_words and end > row * self._row_words for row in rows)


def _told(sums: Running, start: int) -> Done:
    """Tells `sums` of an item's bytes as they are written, `start` words into the payload."""
    return lambda size: sums.written(start + size // 8)


def copy_local(items: Sequence[Item], source: View, view: View, rank: int, proof: bool, scratch: Scratch) -> None:
    """Copy and cast from storage to storage on one rank, without a message.

    With `proof` the destinations, looked up again, are compared bit for bit with what was written: on the CPU each slab
    while it is in the cache. RuntimeError names the first that differs.
    """
    reads, held = _views(source, items, from_source=True), _views(view, items)
    again = _views(view, items) if proof else held
    if proof and on_cpu([*reads, *held, *again]):
        wrong = [n for n, views in enumerate(zip(held, again, reads, strict=True)) if not copy_proven(*views, scratch)]
    else:
        for written, read in zip(held, reads, strict=True):
            copy(written, read, scratch)
        wrong = _differing(list(zip(again, reads, strict=True))) if proof else []
    if wrong:
        raise _mismatch(items, wrong, rank, rank, _STORAGE)


def _differing(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Which of the pairs (held, expected) differ in any bit, once `expected` is cast to the dtype of what is held."""
    # One look at all: each would wait for the device.
    found = [_bits(held) != _bits(expected.to(held.device, held.dtype)) for held, expected in pairs]
    return torch.stack([differ.any() for differ in found]).nonzero().view(-1).tolist() if found else []


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


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
