"""One rank's part of a transfer: packs, unpacks and proves messages, and keeps the first error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.proof import View
from aligner.reshard.plan.schedule import Message
from aligner.reshard.plan.transfer_plan import Item
from aligner.reshard.transfer.local_copy import copy_local
from aligner.reshard.transfer.wire import Wire
from aligner.reshard.weights import WritableWeights
from aligner.spmd.device_clock import PhaseClock


class RankTransfer:
    """Packs and unpacks this rank's buckets; after its first error it goes on exchanging messages, so that no peer hangs."""

    def __init__(
        self, rank: int, source: View | None, destination: WritableWeights | None, buffers: Buffers, verify: bool
    ) -> None:
        self.buffers = buffers
        self.checksummed = 0
        self.clock = PhaseClock(buffers.device, ("pack", "wire", "apply"))
        self._rank, self._source, self._destination = rank, source, destination
        self._verify = verify
        self._failure: BaseException | None = None

    def pack(self, items: Sequence[Item], buffer: Tensor | None) -> Bucket:
        """A bucket of these items, read, cast and checksummed; marked as failed after this rank's first error."""
        bucket = Bucket(items, self.buffers, buffer)
        with self.clock("pack"), self._keep_failure():
            if self._failure is None:
                assert self._source is not None, f"rank {self._rank} sends {items[0]} but has no source"
                bucket.pack(self._source, self._verify)
                return bucket
        bucket.mark_failed()
        return bucket

    def bind_storages(self, bucket: Bucket) -> None:
        """Let large items be received in the destination's storages, where they can be."""
        with self.clock("apply"), self._keep_failure():
            if self._failure is None and self._destination is not None:
                bucket.bind_storages(self._destination.view)

    def finish_receive(self, wire: Wire, message: Message, bucket: Bucket) -> None:
        """Let the wire restore the whole bucket from what was received."""
        with self.clock("apply"), self._keep_failure():
            wire.finish_receive(message, bucket)
            return
        bucket.mark_failed()

    def apply(self, sender: int, bucket: Bucket, beside: Mapping[str, Sequence[Item]]) -> None:
        """Write what rank `sender` packed, prove it, and tell the destination.

        Args:
            beside: tensor -> items to copy after those of the bucket.
        """
        with self._keep_failure():
            if self._failure is not None:
                return
            if bucket.failed():
                raise RuntimeError(
                    f"reshard: rank {sender} failed while it sent {bucket.items[0]} to rank {self._rank}; "
                    "its own error says why"
                )
            destination = self._destination
            assert destination is not None, f"rank {self._rank} receives {bucket.items[0]} but has no destination"
            left = dict(beside)

            def written(items: Sequence[Item]) -> None:
                self._written(items)
                if left and (copied := [own for item in items for own in left.pop(item.name, ())]):
                    self._copy(copied)

            with self.clock("apply"), destination.writing():
                bucket.unpack(destination.view, sender, self._rank, self._verify, written)
            assert not left, f"{left} are to be copied beside what is not in the message"

    def copy(self, items: Sequence[Item]) -> None:
        """Copy what this rank holds itself, and prove it, without a message."""
        with self._keep_failure():
            if self._failure is None:
                assert self._destination, f"rank {self._rank} copies {items[0]} but has no destination"
                with self.clock("apply"), self._destination.writing():
                    self._copy(items)

    def _copy(self, items: Sequence[Item]) -> None:
        source, destination = self._source, self._destination
        assert source and destination, f"rank {self._rank} copies {items[0]} but lacks a source or a destination"
        chunk_buffers = self.buffers.chunk_buffers
        copy_local(items, source, destination.view, self._rank, self._verify, chunk_buffers, self._written)

    def _written(self, items: Sequence[Item]) -> None:
        assert self._destination is not None
        self._destination.written([item.destination for item in items], self._verify)
        self.checksummed += len(items) if self._verify else 0

    def finish(self) -> None:
        """Raise the first error, or let the destination finish."""
        if self._failure is not None:
            raise self._failure
        if self._destination is not None:
            with self.clock("apply"):
                self._destination.finish()

    @contextmanager
    def _keep_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as failure:
            if self._failure is None:
                self._failure = failure
