"""One message: a proof, and the items' elements in the destination's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import inf

import torch
from torch import Tensor

from aligner.reshard.checksum import Checksum, Hashes, Running, Sums
from aligner.reshard.copies import STORAGE, View, differing_pairs, mismatch, views_of
from aligner.reshard.kernels import kernels_of
from aligner.reshard.plan import Item
from aligner.reshard.region import Piece
from aligner.reshard.slabs import Done, Scratch, copy, copy_proven, ignore, on_cpu

APART_BYTES = 128 << 10
"""Items of so many bytes travel by themselves; smaller ones together, since a message of their own would cost more than a copy."""

_OK, _FAILED = 0, 1
_ALIGN_WORDS = 8  # the payload starts on a cache line
_MESSAGE = "the message does not hold what {source} held"


class Buffers:
    """Message buffers, used again within a transfer, and between transfers by whoever keeps them.

    Fresh memory costs a page fault every 4 KiB written. What is kept is at most what a transfer takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernels = kernels_of(device)
        # The kernels make the sums in the pass that packs.
        self.checksum: Checksum = Hashes() if device.type == "cpu" and self.kernels is None else Sums(device)
        self.apart_bytes: float = APART_BYTES if isinstance(self.checksum, Hashes) else inf
        """The least bytes of an item that travels by itself, alike on all ranks of a transfer."""
        self.together = False
        """No item does: what changed since the last transfer is found in a message of one part."""
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
    """What goes from rank to rank at once: `parts`, the first of which are `words`, each other one a large item.

    Words, of 64 bits, are laid out as [status, identity of transfer and items, checksums | payload]. The payload holds the
    small items one after the other, each padded to whole words. A large item leaves from its storage and arrives in its
    storage, without a copy, where it lies in a row there in the dtype that travels; elsewhere it has a place behind the
    payload. Parts may be relayed, as they are, to ranks that want the same regions.
    """

    def __init__(self, items: Sequence[Item], buffers: Buffers) -> None:
        apart = inf if buffers.together else buffers.apart_bytes
        small = [item for item in items if item.bytes < apart]
        self.items = (*small, *(item for item in items if item.bytes >= apart))
        self._small = len(small)
        self._checksum, self._kernels, self._transfer = buffers.checksum, buffers.kernels, buffers.transfer
        self._scratch = buffers.scratch
        self.payload_bytes = sum(item.bytes for item in self.items)
        """Bytes of the items, the padding between them left out."""
        self._bounds = [0]
        for item in small:
            self._bounds.append(self._bounds[-1] + _words(item.bytes))
        self._row_words = buffers.checksum.row_words
        rows = -(-self._bounds[-1] // self._row_words)
        places = [rows * self._row_words]  # of the large ones, in words
        self._rows = [rows]  # the first of each one's, and the end
        for item in self.items[self._small :]:
            places.append(places[-1] + -(-_words(item.bytes) // _ALIGN_WORDS) * _ALIGN_WORDS)
            self._rows.append(self._rows[-1] + -(-_words(item.bytes) // self._row_words))
        header = -(-(2 + self._rows[-1]) // _ALIGN_WORDS) * _ALIGN_WORDS
        self.buffer = buffers.take(header + places[-1])
        self.words = self.buffer[: header + self._bounds[-1]]
        self.header, self.payload = self.words[:header], self.words[header:]
        self.delta: Tensor | None = None
        """The bytes that stand for `words` on the wire, where they are fewer."""
        self._sums = self.buffer[2 : 2 + self._rows[-1]]
        self._payload = self.buffer[header : header + places[0]]
        self._payload[self._bounds[-1] :] = 0  # the last row is summed as a whole on both sides
        self._places = [self.buffer[header + place :] for place in places[:-1]]
        self._held: dict[int, Tensor] = {}
        self.parts = [self.words, *(self._elements(number).view(-1) for number in self._large)]

    @property
    def _large(self) -> range:
        return range(self._small, len(self.items))

    def pack(self, source: View, proof: bool) -> None:
        """Read every item from the source and cast it; with `proof`, sum what was cast while it is in the cache."""
        views = views_of(source, self.items, from_source=True)
        if self._kernels is not None and self._near(views):
            dtypes = [_dtype(item.destination) for item in self.items]
            self._kernels.pack(views, dtypes, self._payload, self._bounds, self._sums)
        else:
            self._pack(views, proof)
        self.words[0], self.words[1] = _OK, self._identity() if proof else 0

    def _pack(self, views: Sequence[Tensor], proof: bool) -> None:
        sums = self._checksum.start(self._payload) if proof else None
        for number, item in enumerate(self.items[: self._small]):
            if item.bytes % 8:
                self._payload[self._bounds[number + 1] - 1] = 0  # padding takes part in the sums
            copy(self._elements(number), views[number], self._scratch, _told(sums, self._bounds[number]))
        if sums is not None:
            self._sums[: self._rows[0]] = sums.finish()
        for number in self._large:
            self._use(number, views[number])
            part = self._part(number)
            sums = self._checksum.start(part) if proof else None
            if part.data_ptr() != views[number].data_ptr():
                copy(self._elements(number), views[number], self._scratch, _told(sums, 0))
            if sums is not None:
                self._sums_of(number).copy_(sums.finish())

    def open(self, view: View) -> None:
        """Before the message is awaited: let large items arrive in the storages where they lie in a row there."""
        for number in self._large:
            (self._held[number],) = views_of(view, self.items[number : number + 1])
            self._use(number, self._held[number])

    def _use(self, number: int, storage: Tensor) -> None:
        """Let a large item travel from or to its storage itself, if it can."""
        part = self._part(number)
        if storage.is_contiguous() and storage.dtype == part.dtype and storage.device == part.device:
            self.parts[1 + number - self._small] = _row(storage)

    def land(self, view: View, by: int, to: int, proof: bool) -> None:
        """Write what rank `by` packed into the storages of rank `to`; with `proof` nothing is believed.

        Then RuntimeError says which item first: where the message is not about these items (nothing is written but what
        arrived in its place), is not word for word what was packed, or where the storages, looked up again, do not hold
        it bit for bit (a NaN equals itself, -0.0 is not 0.0). On the CPU each slab is written, summed and compared while
        it is in the cache, so nothing may overwrite it later: see `storage.check_disjoint`.
        """
        if proof and self.words[:2].tolist() != [_OK, self._identity()]:
            told = f"{len(self.items)} regions from {self.items[0]} on" if self.items else "no regions"
            raise RuntimeError(
                f"reshard: the message from rank {by} to rank {to} is not one of {told} in this transfer"
            )
        held = views_of(view, self.items[: self._small])
        held += [self._held[n] if n in self._held else view(self.items[n].destination) for n in self._large]
        again = views_of(view, self.items) if proof else held
        if not proof:
            self._write(held)
        elif on_cpu([*held, *again, self.words]):
            sums, differing = self._land_slabs(held, again)
            self._settle(sums, differing, by, to)
        else:
            rows = (self._kernels or self._checksum).rows
            self._settle(torch.cat([rows(part) for part in (self._payload, *self.parts[1:])]), [], by, to)
            self._write(held)
            self._settle(self._sums, self._differing(again), by, to)

    def _land_slabs(self, held: Sequence[Tensor], again: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Writes; gives the sums of the message, and which items the storages do not hold."""
        sums, differing = self._checksum.start(self._payload), []
        for number, (written, read) in enumerate(zip(held[: self._small], again, strict=False)):
            done = _told(sums, self._bounds[number])
            if not copy_proven(written, read, self._elements(number), self._scratch, done):
                differing.append(number)
        found = [sums.finish()]
        for number in self._large:
            if self._arrived(number, held[number]):  # one look says that it came, and that it is there
                found.append(self._sums_of(number))
                if not torch.equal(self._checksum.rows(_row(again[number].contiguous())), found[-1]):
                    differing.append(number)
                continue
            sums = self._checksum.start(self._part(number))
            if not copy_proven(held[number], again[number], self._elements(number), self._scratch, _told(sums, 0)):
                differing.append(number)
            found.append(sums.finish())
        return torch.cat(found), differing

    def _arrived(self, number: int, held: Tensor) -> bool:
        """Whether an item came in where it belongs."""
        return number >= self._small and self._part(number).data_ptr() == held.data_ptr()

    def _write(self, held: Sequence[Tensor]) -> None:
        if self._kernels is not None and self._near(held):
            self._kernels.unpack(held, self._payload, self._bounds)
        else:
            for number, written in enumerate(held):
                if not self._arrived(number, written):
                    written.copy_(self._elements(number))

    def _differing(self, held: Sequence[Tensor]) -> list[int]:
        if self._kernels is not None and self._near(held):
            found = self._kernels.differs(held, self._payload, self._bounds)
            return found.nonzero().view(-1).tolist()
        return differing_pairs([(read, self._elements(number)) for number, read in enumerate(held)])

    def _settle(self, sums: Tensor, differing: Sequence[int], by: int, to: int) -> None:
        """RuntimeError where the message is wrong, or else where the storages are."""
        wrong = (sums != self._sums).nonzero().view(-1).tolist()
        if wrong:
            touched = [number for number in range(len(self.items)) if self._overlaps(number, wrong)]
            raise mismatch(self.items, touched, by, to, _MESSAGE)
        if differing:
            raise mismatch(self.items, differing, by, to, STORAGE)

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
        """An item's place in the payload or behind it, in the destination's dtype."""
        item = self.items[number]
        place = self._payload[self._bounds[number] :] if number < self._small else self._places[number - self._small]
        return place[: _words(item.bytes)].view(_dtype(item.destination))[: item.destination.elements].view(item.size)

    def _part(self, number: int) -> Tensor:
        """What travels of a large item."""
        return self.parts[1 + number - self._small]

    def _sums_of(self, number: int) -> Tensor:
        """The checksums of a large item."""
        return self._sums[slice(*self._rows[number - self._small : number - self._small + 2])]

    def _overlaps(self, number: int, rows: Sequence[int]) -> bool:
        if number >= self._small:
            first, end = self._rows[number - self._small : number - self._small + 2]
            return any(first <= row < end for row in rows)
        start, end = self._bounds[number], self._bounds[number + 1]
        return any(start < (row + 1) * self._row_words and end > row * self._row_words for row in rows)


def _row(tensor: Tensor) -> Tensor:
    """A contiguous tensor's elements in a row; torch keeps any stride of a single one, and cannot view its bytes then."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _words(size: int) -> int:
    """64-bit words that hold so many bytes."""
    return (size + 7) // 8


def _told(sums: Running | None, start: int) -> Done:
    """Tells `sums` of an item's bytes as they are written, `start` words into what is summed."""
    return ignore if sums is None else lambda size: sums.written(start + size // 8)


def _dtype(piece: Piece) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, piece.dtype)
    return dtype
