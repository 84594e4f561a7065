"""One message: a proof, and the items' elements in the destination's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligner.reshard.message.checksum import Checksum, Hashes, Parts, Running, Sums, hash_of
from aligner.reshard.message.chunked_copy import Done, Scratch, bytes_of, copy, copy_proven, copy_seen, ignore, on_cpu
from aligner.reshard.message.kernels import kernels_of
from aligner.reshard.message.message_layout import MessageLayout, message_layout, words
from aligner.reshard.message.proof import STORAGE, View, differing_pairs, mismatch, views_of
from aligner.reshard.plan.transfer_plan import Item

if TYPE_CHECKING:
    from aligner.reshard.transfer.shared_memory import SharedMemoryChannel

LARGE_BYTES = 128 << 10
"""Items of at least this size are sent from and into their storages, without a copy; smaller ones are packed together, since a
message of its own would cost more than a copy."""

SHARED_MESSAGE_BYTES = 4 << 20
"""Bound on a message in shared memory: it is still in the cache when its reader comes."""

_OK, _FAILED = 0, 1
_MESSAGE = "the message does not hold what {source} held"


class Buffers:
    """Message buffers, used again within a transfer, and between transfers by whoever keeps them.

    Fresh memory costs a page fault every 4 KiB written. What is kept is at most what a transfer takes.
    """

    def __init__(self, device: torch.device, channel: SharedMemoryChannel | None = None) -> None:
        """
        Args:
            channel: where messages travel in shared memory; all ranks of a transfer, and CPU, or none.
        """
        self.device, self.channel = device, channel
        self.kernels = kernels_of(device)
        # The kernels make the sums in the pass that packs.
        self.checksum: Checksum = Hashes() if device.type == "cpu" and self.kernels is None else Sums(device)
        self.large_bytes: float = LARGE_BYTES if isinstance(self.checksum, Hashes) else inf
        """Size from which on an item is large; the same on all ranks of a transfer."""
        self.together = False
        """No item counts as large: deltas are made of messages in one part."""
        self.most_bytes: float = SHARED_MESSAGE_BYTES if channel else inf
        """Bound on a message; the same on all ranks of a transfer."""
        self.scratch = Scratch()
        self._forms: dict[tuple[int, float], tuple[Sequence[Item], MessageLayout]] = {}
        self.transfer = 0
        """Number of the transfer at hand, equal on all its ranks: a message of another one is refused."""
        self._spare: list[Tensor] = []

    def layout(self, items: Sequence[Item]) -> MessageLayout:
        """The layout of a message of these items, made once for as long as the buffers are kept."""
        apart = inf if self.together else self.large_bytes
        known = self._forms.get((id(items), apart))
        if known is None or known[0] is not items:
            known = self._forms[id(items), apart] = items, message_layout(items, apart, self.checksum.row_words)
        return known[1]

    def take(self, words: int) -> Tensor:
        """A buffer of at least `words` 64-bit words: the smallest spare one that is large enough, else a new one."""
        fits = [place for place, spare in enumerate(self._spare) if spare.numel() >= words]
        if fits:
            return self._spare.pop(min(fits, key=lambda place: self._spare[place].numel()))
        if self._spare:
            self._spare.pop()  # outgrown: the new one takes its place, so that the spares stay few
        return torch.empty(words, dtype=torch.int64, device=self.device)

    def give(self, bucket: Bucket) -> None:
        """Take back the buffer of a bucket that was sent or applied; one in shared memory goes back to its writer."""
        if self.channel is None or not self.channel.back(bucket.buffer):
            self._spare.append(bucket.buffer)


class Bucket:
    """What goes from rank to rank at once: `parts`, the first of which are `words`, each other one a large item.

    Words, of 64 bits, are laid out as [status, identity of transfer and items, checksums | payload]. The payload holds the
    small items. A large item leaves from its storage and arrives in its storage, without a copy, where it lies in a row
    there in the dtype that travels; elsewhere, and in memory that is shared, it has a place behind the payload. Parts may
    be relayed, as they are, to ranks that want the same regions.
    """

    def __init__(self, items: Sequence[Item], buffers: Buffers, buffer: Tensor | None = None) -> None:
        """`buffer`: shared memory to pack into or read from; None takes one of `buffers`."""
        self._form = form = buffers.layout(items)
        self.items, self.payload_bytes = form.items, form.payload_bytes
        self._checksum, self._kernels, self._scratch = buffers.checksum, buffers.kernels, buffers.scratch
        self._identity = form.identity(buffers.transfer)
        self._shared = buffers.channel is not None
        self.buffer = buffers.take(form.words) if buffer is None else buffer
        self.words = self.buffer[: form.header + form.bounds[-1]]
        self.header, self.payload = self.words[: form.header], self.words[form.header :]
        self.delta: Tensor | None = None
        """The bytes that stand for `words` on the wire, where they are fewer."""
        self.whole = self.buffer[: form.words]
        """Words, and room for the large items behind them."""
        self._sums = self.buffer[2 : 2 + form.sums]
        self._behind = self.buffer[form.header :]
        self._payload = self._behind[: form.places[0]]
        self._payload[form.bounds[-1] :] = 0  # the last row is summed as a whole on both sides
        self._storages: dict[int, Tensor] = {}
        """Of the large items, those that leave from or arrive in their storage."""
        self._opened: dict[int, Tensor] = {}

    @property
    def parts(self) -> list[Tensor]:
        return [self.words, *(self._travelling(number) for number in self._form.large)]

    def pack(self, source: View, proof: bool) -> None:
        """Read every item from the source and cast it; with `proof`, sum what was cast while it is in the cache."""
        views = views_of(source, self.items, from_source=True)
        if self._kernels is not None and self._near(views):
            self._kernels.pack(views, self._form.dtypes, self._payload, self._form.bounds, self._sums)
        else:
            self._pack(views, proof)
        self.words[0], self.words[1] = _OK, self._identity if proof else 0

    def _pack(self, views: Sequence[Tensor], proof: bool) -> None:
        form, found = self._form, list[int]()
        sums = self._checksum.start(self._payload) if proof else None
        for number, item in enumerate(self.items[: form.small]):
            if item.bytes % 8:
                self._payload[form.bounds[number + 1] - 1] = 0  # padding takes part in the sums
            copy(self._elements(number), views[number], self._scratch, _told(sums, form.bounds[number]))
        if sums is not None:
            found += sums.finish()
        for number in form.large:
            if self._use(number, views[number]):
                found.append(hash_of(bytes_of(views[number])) if proof else 0)
                continue
            place, seen = self._elements(number), Parts()
            if proof:
                copy_seen(place, place, views[number], self._scratch, seen.add)
            else:
                copy(place, views[number], self._scratch)
            found.append(seen.finish())
        if proof:
            self._sums.copy_(torch.tensor(found, dtype=torch.int64))

    def open(self, view: View) -> None:
        """Before the message is awaited: let large items arrive in the storages where they lie in a row there."""
        large = self._form.large
        for number, held in zip(large, views_of(view, self.items[large.start :]), strict=True):
            self._opened[number] = held
            self._use(number, held)

    def _use(self, number: int, storage: Tensor) -> bool:
        """Let a large item travel from or to its storage itself, if it can."""
        fits = (
            not self._shared
            and storage.is_contiguous()
            and storage.dtype == self._form.dtypes[number]
            and storage.device == self.words.device
        )
        if fits:
            self._storages[number] = storage
        return fits

    def land(self, view: View, by: int, to: int, proof: bool) -> None:
        """Write what rank `by` packed into the storages of rank `to`; with `proof` nothing is believed.

        Then RuntimeError says which item first: where the message is not about these items (nothing is written but what
        arrived in its place), is not word for word what was packed, or where the storages, looked up again, do not hold
        it bit for bit (a NaN equals itself, -0.0 is not 0.0). On the CPU each chunk is written, summed and compared while
        it is in the cache, so nothing may overwrite it later: see `storage.check_disjoint`.
        """
        if proof and self.words[:2].tolist() != [_OK, self._identity]:
            told = f"{len(self.items)} regions from {self.items[0]} on" if self.items else "no regions"
            raise RuntimeError(
                f"reshard: the message from rank {by} to rank {to} is not one of {told} in this transfer"
            )
        unopened = [item for number, item in enumerate(self.items) if number not in self._opened]
        held = [*views_of(view, unopened), *self._opened.values()]  # all large items are opened, or none
        again = views_of(view, self.items) if proof else held
        if not proof:
            self._write(held)
        elif on_cpu([*held, *again, self.words]):
            sums, differing = self._land_chunks(held, again)
            self._settle(sums, differing, by, to)
        else:
            sums = (self._kernels or self._checksum).rows(self._payload).tolist()
            for number in self._form.large:
                sums.append(hash_of(bytes_of(self._travelling(number))))
            self._settle(sums, [], by, to)
            self._write(held)
            self._settle(sums, self._differing(again), by, to)

    def _land_chunks(self, held: Sequence[Tensor], again: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """Writes; gives the sums of the message, and which items the storages do not hold."""
        form, found, differing = self._form, list[int](), list[int]()
        sums = self._checksum.start(self._payload)
        for number in range(form.small):
            done = _told(sums, form.bounds[number])
            if not copy_proven(held[number], again[number], self._elements(number), self._scratch, done):
                differing.append(number)
        found += sums.finish()
        for number, sent in zip(form.large, self._sums[form.rows :].tolist(), strict=True):
            came = self._land_large(number, sent, held[number], again[number])
            found.append(sent if came is None else came)
            if came is not None:
                differing.append(number)
        return found, differing

    def _land_large(self, number: int, sent: int, held: Tensor, again: Tensor) -> int | None:
        """Writes a large item. None: the storage holds what was sent; else the sum of what came, if that is known."""
        if number in self._storages:  # one look says that it came, and that it is there
            return None if hash_of(bytes_of(again.contiguous())) == sent else sent
        came, seen = self._elements(number), Parts()
        copy_seen(held, again, came, self._scratch, seen.add)
        return None if seen.finish() == sent else hash_of(bytes_of(came))

    def _write(self, held: Sequence[Tensor]) -> None:
        if self._kernels is not None and self._near(held):
            self._kernels.unpack(held, self._payload, self._form.bounds)
        else:
            for number, written in enumerate(held):
                if number not in self._storages:
                    written.copy_(self._elements(number))

    def _differing(self, held: Sequence[Tensor]) -> list[int]:
        if self._kernels is not None and self._near(held):
            found = self._kernels.differs(held, self._payload, self._form.bounds)
            return found.nonzero().view(-1).tolist()
        return differing_pairs([(read, self._travelling(number)) for number, read in enumerate(held)])

    def _settle(self, sums: Sequence[int], differing: Sequence[int], by: int, to: int) -> None:
        """RuntimeError where the message is wrong, or else where the storages are."""
        wrong = [row for row, pair in enumerate(zip(sums, self._sums.tolist(), strict=True)) if pair[0] != pair[1]]
        if wrong:
            touched = self._form.touched(wrong, self._checksum.row_words)
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

    def _travelling(self, number: int) -> Tensor:
        """What is sent or received of an item."""
        return self._storages[number] if number in self._storages else self._elements(number)

    def _elements(self, number: int) -> Tensor:
        """An item's place in the payload or behind it, in the destination's dtype."""
        form, item = self._form, self.items[number]
        start = form.bounds[number] if number < form.small else form.places[number - form.small]
        room = self._behind[start : start + words(item.bytes)].view(form.dtypes[number])
        return room[: item.destination.elements].view(item.size)


def _told(sums: Running | None, start: int) -> Done:
    """Tells `sums` of an item's bytes as they are written, `start` words into what is summed."""
    return ignore if sums is None else lambda size: sums.written(start + size // 8)
