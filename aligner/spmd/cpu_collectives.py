"""All-gather and reduce-scatter between CPUs, for weights and gradients: through shared memory on one host, else by sends.

gloo's reduce-scatter reduces all of a buffer on every rank, its all-gather copies what it is given first, and loopback copies each
byte twice more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.spmd.shared_memory import connect

CHUNK_BYTES = 2 << 20
"""Of a message in shared memory: what one rank has written, the other reads from the cache."""


class CpuCollectives:
    """Collectives over one process group, in place of gloo's. Each is called on all its ranks, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Connects the ranks; collective over `group`."""
        self.group = group
        self._ranks, self._place = dist.get_process_group_ranks(group), group.rank()
        self._channel = connect(group, "weights and gradients")

    def all_gather(self, whole: Tensor) -> None:
        """Every rank's part, in the order of the ranks.

        Args:
            whole: [N], contiguous; its part of [N / ranks] is this rank's already.
        """
        parts = whole.view(len(self._ranks), -1)
        own = parts[self._place]
        if self._channel is not None:
            for to, by in self._rounds():
                for elements, received in self._exchange(own, to, by):
                    parts[by, elements] = received
            return
        works = [dist.irecv(parts[by], group=self.group, group_src=by) for _, by in self._rounds() if own.numel()]
        works += [dist.isend(own, group=self.group, group_dst=to) for to, _ in self._rounds() if own.numel()]
        for work in works:
            assert work is not None, "a rank of the group"
            work.wait()

    def reduce_scatter(self, whole: Tensor, out: Tensor) -> None:
        """The sum of each part on its rank, in a fixed order of ranks.

        Args:
            whole: [N], contiguous: this rank's summands of all parts, in the order of the ranks.
            out: [N / ranks], this rank's part of the sum; may be its part of `whole`.
        """
        parts = whole.view(len(self._ranks), -1)
        own = parts[self._place]
        if own.data_ptr() != out.data_ptr():
            out.copy_(own)
        if self._channel is not None:
            for to, by in self._rounds():
                for elements, received in self._exchange(parts[to], to, by):
                    out[elements] += received
            return
        sends = [dist.isend(parts[to], group=self.group, group_dst=to) for to, _ in self._rounds()]
        received = torch.empty_like(out)
        for _, by in self._rounds():
            dist.recv(received, group=self.group, group_src=by)
            out += received
        for send in sends:
            assert send is not None, "a rank of the group"
            send.wait()

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """Of each round: the place in the group to send to, and the one to receive from."""
        for distance in range(1, len(self._ranks)):
            yield (self._place + distance) % len(self._ranks), (self._place - distance) % len(self._ranks)

    def _exchange(self, sent: Tensor, to: int, by: int) -> Iterator[tuple[slice, Tensor]]:
        """Send [n], and get as much from another rank: which elements, and their values while they are in shared memory.

        All ranks do so at once and each waits for a slot only while a peer is rounds behind, so that the last one never waits.
        """
        assert self._channel is not None
        size = CHUNK_BYTES // sent.element_size()
        for start in range(0, sent.numel(), size):
            chunk = sent[start : start + size]
            words = -(-chunk.nbytes // 8)
            while (slot := self._channel.slot(words)) is None:
                self._channel.wait_for_slot()
            slot.view(sent.dtype)[: chunk.numel()] = chunk
            self._channel.send(self._ranks[to], slot)
            message = self._channel.receive(self._ranks[by])
            yield slice(start, start + chunk.numel()), message.view(sent.dtype)[: chunk.numel()]
            self._channel.release(message)
