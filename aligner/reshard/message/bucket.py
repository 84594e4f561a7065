"""One message: checksums, and the items' elements in the destination's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligner.reshard.message.checksum import Checksum, Hashes, RunningChecksums, Sums, hash_of
from aligner.reshard.message.chunked_copy import (
    ChunkBuffers,
    Progress,
    bytes_of,
    copy,
    copy_bytes,
    copy_bytes_hashed,
    copy_bytes_verified,
    copy_hashed,
    copy_verified,
    no_progress,
    plain,
)
from aligner.reshard.message.kernels import kernels_of
from aligner.reshard.message.message_layout import MessageLayout, message_layout, words
from aligner.reshard.message.proof import (
    STORAGE,
    View,
    Written,
    differing_pairs,
    mismatch,
    not_followed,
    view_of,
    views_of,
)
from aligner.reshard.plan.transfer_plan import Item

if TYPE_CHECKING:
    from aligner.spmd.shared_memory import SharedMemoryChannel

LARGE_BYTES = 128 << 10
"""Items of at least this size are sent from and received into their storages, without a copy; smaller ones are packed together,
since a message of its own would cost more than a copy."""

SHARED_MESSAGE_BYTES = 6 << 20
"""Bound on a message in shared memory: it is still in the cache when its reader comes, and large enough that the 0.3 to 0.4 ms
which a rank spends on each message count for little."""

_OK, _FAILED = 0, 1
_MESSAGE = "the message does not hold what {source} held"


class Buffers:
    """Message buffers, reused within a transfer, and between transfers where the caller keeps them.

    Fresh memory costs a page fault every 4 KiB written. Kept buffers are at most what one transfer needs.
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
        self.single_part = False
        """No item counts as large: deltas are made of messages in one part."""
        self.chunk_buffers = ChunkBuffers()
        self._layouts: dict[tuple[int, float], tuple[Sequence[Item], MessageLayout]] = {}
        self.transfer_number = 0
        """Number of the current transfer, equal on all its ranks: a message of another one is refused."""
        self._spare: list[Tensor] = []

    def layout(self, items: Sequence[Item]) -> MessageLayout:
        """The layout of a message of these items, made once for as long as the buffers are kept."""
        large_bytes = inf if self.single_part else self.large_bytes
        cached = self._layouts.get((id(items), large_bytes))
        if cached is None or cached[0] is not items:
            cached = self._layouts[id(items), large_bytes] = (
                items,
                message_layout(items, large_bytes, self.checksum.row_words),
            )
        return cached[1]

    def take(self, words: int) -> Tensor:
        """A buffer of at least `words` 64-bit words: the smallest spare one that is large enough, else a new one."""
        fitting = [number for number, spare in enumerate(self._spare) if spare.numel() >= words]
        if fitting:
            return self._spare.pop(min(fitting, key=lambda number: self._spare[number].numel()))
        if self._spare:
            self._spare.pop()  # outgrown: the new one takes its place, so that the number of spares stays bounded
        return torch.empty(words, dtype=torch.int64, device=self.device)

    def give(self, bucket: Bucket) -> None:
        """Take back the buffer of a bucket that was sent or applied; shared memory is released to its writer."""
        if self.channel is None or not self.channel.release(bucket.buffer):
            self._spare.append(bucket.buffer)


class Bucket:
    """One message between two ranks: `parts`, of which the first is `words` and each other one a large item.

    Words, of 64 bits, are laid out as [status, identity of transfer and items, checksums | payload]. The payload holds the
    small items. A large item is sent from its storage and received in its storage, without a copy, where it is contiguous
    there and of the dtype that is sent; otherwise, and in shared memory, it has a place behind the payload. Parts may be
    relayed, as they are, to ranks that want the same regions.
    """

    def __init__(self, items: Sequence[Item], buffers: Buffers, buffer: Tensor | None = None) -> None:
        """`buffer`: shared memory to pack into or read from; None takes one of `buffers`."""
        self._layout = layout = buffers.layout(items)
        self.items, self.payload_bytes = layout.items, layout.payload_bytes
        self._checksum, self._kernels, self._chunk_buffers = buffers.checksum, buffers.kernels, buffers.chunk_buffers
        self._identity = layout.identity(buffers.transfer_number)
        self._hashed, self._shared = isinstance(buffers.checksum, Hashes), buffers.channel is not None
        self.buffer = buffers.take(layout.words) if buffer is None else buffer
        self.words = self.buffer[: layout.header + layout.bounds[-1]]
        self.delta: Tensor | None = None
        """What is sent instead of `words`, where it is shorter."""
        self._sums = self.buffer[2 : 2 + layout.sums]
        self._body = self.buffer[layout.header :]
        self._payload = self._body[: layout.places[0]]
        self._memory = bytes_of(self.buffer) if self.buffer.is_cpu else None
        self._start = self.buffer.data_ptr() + 8 * layout.header if self._memory is not None else 0
        self._payload[layout.bounds[-1] :] = 0  # the last row is summed as a whole on both sides
        self._storages: dict[int, Tensor] = {}
        """Of the large items, those that are sent from or received in their storage."""
        self._bound: dict[int, Tensor] = {}
        """Of a message to receive: the large items' views of the destination."""

    @property
    def header(self) -> Tensor:
        """Of `words`, what comes before the payload."""
        return self.words[: self._layout.header]

    @property
    def payload(self) -> Tensor:
        """Of `words`, the small items."""
        return self.words[self._layout.header :]

    @property
    def whole(self) -> Tensor:
        """Words, and room for the large items behind them."""
        return self.buffer[: self._layout.words]

    @property
    def parts(self) -> list[Tensor]:
        return [self.words, *(self._wire_tensor(number) for number in self._layout.large)]

    def pack(self, source: View, proof: bool) -> None:
        """Read every item from the source and cast it; with `proof`, sum what was cast while it is in the cache."""
        views = views_of(source, self.items, from_source=True)
        if self._kernels is not None and self._on_device(views):
            self._kernels.pack(views, self._layout.dtypes, self._payload, self._layout.bounds, self._sums)
        else:
            self._pack(views, proof)
        self.words[0], self.words[1] = _OK, self._identity if proof else 0

    def _pack(self, views: Sequence[Tensor], proof: bool) -> None:
        layout, checksums = self._layout, list[int]()
        running = self._checksum.start(self._payload) if proof else None
        for number in range(layout.small):
            if layout.sizes[number] % 8:
                self._payload[layout.bounds[number + 1] - 1] = 0  # padding takes part in the sums
            self._pack_small(number, views[number], self._progress(running, number))
        if running is not None:
            checksums += running.finish()
        for number in layout.large:
            if self._bind(number, views[number]):
                checksums.append(hash_of(bytes_of(views[number])) if proof else 0)
            else:
                checksums.append(self._pack_large(number, views[number], proof))
        if proof:
            self._sums.copy_(torch.tensor(checksums, dtype=torch.int64))

    def _progress(self, checksums: RunningChecksums | None, number: int) -> Progress:
        """Updates `checksums` as a small item's bytes are written."""
        if checksums is None or self._layout.rows == 1:  # a single row is summed when all of it is there
            return no_progress
        start = self._layout.bounds[number]
        return lambda size: checksums.written(start + size // 8)

    def _pack_small(self, number: int, view: Tensor, progress: Progress) -> None:
        if self._in_plain_memory(number, view):
            copy_bytes(self._address(number), view.data_ptr(), self._layout.sizes[number], progress)
        else:
            copy(self._elements(number), view, self._chunk_buffers, progress)

    def _pack_large(self, number: int, view: Tensor, proof: bool) -> int:
        """Copies a large item to its place; returns the hash of what is there then, if there is to be a proof."""
        if not proof:
            copy(self._elements(number), view, self._chunk_buffers)
            return 0
        if self._in_plain_memory(number, view):
            return copy_bytes_hashed(self._address(number), view.data_ptr(), self._bytes_at(number))
        place = self._elements(number)
        return copy_hashed(place, place, view, self._chunk_buffers)

    def bind_storages(self, view: View) -> None:
        """Before the message is received: let large items be received in their storages, where they are contiguous there."""
        large = self._layout.large
        for number, storage in zip(large, views_of(view, self.items[large.start :]), strict=True):
            self._bound[number] = storage
            self._bind(number, storage)

    def _bind(self, number: int, storage: Tensor) -> bool:
        """Send or receive a large item in its storage itself, if that is possible."""
        possible = (
            not self._shared
            and storage.is_contiguous()
            and storage.dtype == self._layout.dtypes[number]
            and storage.device == self.words.device
        )
        if possible:
            self._storages[number] = storage
        return possible

    def unpack(self, view: View, sender: int, receiver: int, proof: bool, written: Written = not_followed) -> None:
        """Write what rank `sender` packed into the storages of rank `receiver`; with `proof` verify every step.

        RuntimeError then names the first item that is wrong: where the message is not about these items (nothing is
        written but what was received in its storage), is not word for word what was packed, or where the storages, looked
        up again, do not hold it bit for bit (a NaN equals itself, -0.0 is not 0.0). On the CPU each chunk is written, summed and compared while
        it is in the cache, so nothing may overwrite it later: see `storage.check_disjoint`.

        Args:
            written: told of items once they have been written and, with `proof`, found right.
        """
        if proof and self.words[:2].tolist() != [_OK, self._identity]:
            regions = f"{len(self.items)} regions from {self.items[0]} on" if self.items else "no regions"
            raise RuntimeError(
                f"reshard: the message from rank {sender} to rank {receiver} is not one of {regions} in this transfer"
            )
        if proof and self._hashed and self.words.is_cpu:
            self._write_hashed(view, sender, receiver, written)
            return
        unbound = [item for number, item in enumerate(self.items) if number not in self._bound]
        storages = [*views_of(view, unbound), *self._bound.values()]  # all large items are bound, or none
        if not proof:
            self._write(storages)
        else:
            readbacks = views_of(view, self.items)
            checksums = (self._kernels or self._checksum).rows(self._payload).tolist()
            for number in self._layout.large:
                checksums.append(hash_of(bytes_of(self._wire_tensor(number))))
            self._raise_mismatch(checksums, [], sender, receiver)
            self._write(storages)
            self._raise_mismatch(checksums, self._differing(readbacks), sender, receiver)
        written(self.items)

    def _write_hashed(self, view: View, sender: int, receiver: int, written: Written) -> None:
        """Writes a message that is in the host's memory chunk by chunk, each proven while it is in the cache."""
        layout, differing, expected = self._layout, list[int](), self._sums.tolist()
        running = self._checksum.start(self._payload)
        for number in range(layout.small):
            if not self._write_small(number, view, self._progress(running, number)):
                differing.append(number)
        checksums = running.finish()
        right = not differing and checksums == expected[: layout.rows]
        if right and layout.small:
            written(self.items[: layout.small])
        for number, sent in zip(layout.large, expected[layout.rows :], strict=True):
            wrong = self._write_large(number, sent, view)
            checksums.append(sent if wrong is None else wrong)
            if wrong is not None:
                differing.append(number)
                right = False
            elif right:  # at once, so that the engine packs a module while it is in the cache
                written(self.items[number : number + 1])
        self._raise_mismatch(checksums, differing, sender, receiver)

    def _write_small(self, number: int, view: View, progress: Progress) -> bool:
        """Writes a small item; False where the storage does not hold it then."""
        item = self.items[number]
        storage, readback = view_of(view, item), view_of(view, item)
        if self._in_plain_memory(number, storage, readback):
            addresses = storage.data_ptr(), readback.data_ptr(), self._address(number)
            return copy_bytes_verified(*addresses, self._layout.sizes[number], progress)
        return copy_verified(storage, readback, self._elements(number), self._chunk_buffers, progress)

    def _write_large(self, number: int, sent: int, view: View) -> int | None:
        """Writes a large item, whose hash was `sent`. None: the storage holds it; else the hash of what was received, if known."""
        item, storage = self.items[number], self._bound.get(number)
        storage = view_of(view, item) if storage is None else storage
        readback = view_of(view, item)
        if number in self._storages:  # it was received there: one hash proves the message and the storage
            return None if hash_of(bytes_of(readback.contiguous())) == sent else sent
        if self._in_plain_memory(number, storage, readback):
            held = copy_bytes_hashed(storage.data_ptr(), self._address(number), bytes_of(readback))
        else:
            held = copy_hashed(storage, readback, self._elements(number), self._chunk_buffers)
        return None if held == sent else hash_of(self._bytes_at(number))

    def _write(self, storages: Sequence[Tensor]) -> None:
        if self._kernels is not None and self._on_device(storages):
            self._kernels.unpack(storages, self._payload, self._layout.bounds)
        else:
            for number, storage in enumerate(storages):
                if number not in self._storages:
                    storage.copy_(self._elements(number))

    def _differing(self, readbacks: Sequence[Tensor]) -> list[int]:
        if self._kernels is not None and self._on_device(readbacks):
            differs = self._kernels.differs(readbacks, self._payload, self._layout.bounds)
            return differs.nonzero().view(-1).tolist()
        return differing_pairs([(read, self._wire_tensor(number)) for number, read in enumerate(readbacks)])

    def _raise_mismatch(self, checksums: Sequence[int], differing: Sequence[int], sender: int, receiver: int) -> None:
        """RuntimeError where the message is wrong, or else where the storages are."""
        pairs = zip(checksums, self._sums.tolist(), strict=True)
        wrong = [number for number, (received, sent) in enumerate(pairs) if received != sent]
        if wrong:
            covered = self._layout.covered_items(wrong, self._checksum.row_words)
            raise mismatch(self.items, covered, sender, receiver, _MESSAGE)
        if differing:
            raise mismatch(self.items, differing, sender, receiver, STORAGE)

    def mark_failed(self) -> None:
        """Tell the receiver not to use this bucket."""
        self.words[0] = _FAILED

    def failed(self) -> bool:
        return int(self.words[0]) != _OK

    def _on_device(self, views: Sequence[Tensor]) -> bool:
        return all(view.device == self.words.device for view in views)

    def _wire_tensor(self, number: int) -> Tensor:
        """What is sent or received of a large item."""
        return self._storages[number] if number in self._storages else self._elements(number)

    def _in_plain_memory(self, number: int, *tensors: Tensor) -> bool:
        """Whether the message is in the host's memory and these hold an item, one after the other, as the message does: the functions
        of addresses then need no tensor of its place, which would take longer to make than a small region to copy."""
        return self._memory is not None and plain(self._layout.dtypes[number], *tensors)

    def _address(self, number: int) -> int:
        """Of an item's place, in the host's memory."""
        return self._start + 8 * self._layout.starts[number]

    def _bytes_at(self, number: int) -> memoryview:
        """An item's place, in the host's memory."""
        assert self._memory is not None
        start = 8 * (self._layout.header + self._layout.starts[number])
        return self._memory[start : start + self._layout.sizes[number]]

    def _elements(self, number: int) -> Tensor:
        """An item's place in the destination's dtype."""
        item, start = self.items[number], self._layout.starts[number]
        place = self._body[start : start + words(self._layout.sizes[number])].view(self._layout.dtypes[number])
        return place[: item.destination.elements].view(item.size)
