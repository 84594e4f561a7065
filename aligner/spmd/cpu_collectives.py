"""All-gather and reduce-scatter between CPUs, for weights and gradients: through shared memory on one host, else by sends.

gloo's reduce-scatter reduces all of a buffer on every rank, its all-gather copies what it is given first, and loopback copies each
byte twice more. Both take lists of tensors, so that nothing is copied into one buffer before and out of it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.spmd.shared_memory import connect

CHUNK_BYTES = 2 << 20
"""Of a message in shared memory: what one rank has written, the other reads from the cache."""

_Span = tuple[int, slice]
"""A number of a tensor, and which of its elements."""


class CpuCollectives:
    """Collectives over one process group, in place of gloo's. Each is called on all its ranks, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Connects the ranks; collective over `group`."""
        self.group = group
        self._ranks, self._place = dist.get_process_group_ranks(group), group.rank()
        self._channel = connect(group, "weights and gradients")

    def all_gather(self, own: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
        """Every rank's parts, in the order of the ranks.

        Args:
            own: [n] each, all of one type; may be this rank's rows of `wholes`.
            wholes: [ranks, n] each, of that type.
        """
        for whole, part in zip(wholes, own, strict=True):
            if whole[self._place].data_ptr() != part.data_ptr():
                whole[self._place] = part
        for to, by in self._rounds():
            for number, elements, received in self._exchange(own, to, [len(part) for part in own], by):
                wholes[number][by, elements] = received

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]], out: Sequence[Tensor]) -> None:
        """The sums of each rank's parts on that rank, in a fixed order of ranks.

        Args:
            parts: rank -> this rank's summands of that rank's parts, [n] each, all of one type.
            out: this rank's parts of the sum, [n] each; may be its own of `parts`.
        """
        own, lengths = parts[self._place], [len(part) for part in out]
        at_once = len(parts) > 1 and all(one.dtype == other.dtype for one, other in zip(out, own, strict=True))
        if not at_once:
            for total, part in zip(out, own, strict=True):
                total.copy_(part)
        for count, (to, by) in enumerate(self._rounds()):
            sums = own if at_once and not count else out
            for number, elements, received in self._exchange(parts[to], to, lengths, by):
                torch.add(sums[number][elements], received, out=out[number][elements])

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """Of each round: the place in the group to send to, and the one to receive from."""
        for distance in range(1, len(self._ranks)):
            yield (self._place + distance) % len(self._ranks), (self._place - distance) % len(self._ranks)

    def _exchange(
        self, sent: Sequence[Tensor], to: int, wanted: Sequence[int], by: int
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Send these and get as many of these lengths: which elements of which, and their values as long as they are there.

        All ranks do so at once, and each waits for a slot only while a peer is messages behind, so that the last one never waits.
        """
        if not sent:
            return
        dtype, channel = sent[0].dtype, self._channel
        if channel is None:
            yield from self._sends(sent, to, wanted, by, dtype)
            return
        limit = CHUNK_BYTES // dtype.itemsize
        for outgoing, incoming in zip_longest(_messages([len(one) for one in sent], limit), _messages(wanted, limit)):
            if outgoing is not None:
                length = sum(elements.stop - elements.start for _, elements in outgoing)
                words = -(-length * dtype.itemsize // 8)
                while (slot := channel.slot(words)) is None:
                    channel.wait_for_slot()
                rest = slot.view(dtype)
                for number, elements in outgoing:
                    part = sent[number][elements]
                    rest[: len(part)] = part
                    rest = rest[len(part) :]
                channel.send(self._ranks[to], slot)
            if incoming is not None:
                message = channel.receive(self._ranks[by])
                rest = message.view(dtype)
                for number, elements in incoming:
                    length = elements.stop - elements.start
                    yield number, elements, rest[:length]
                    rest = rest[length:]
                channel.release(message)

    def _sends(
        self, sent: Sequence[Tensor], to: int, wanted: Sequence[int], by: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, slice, Tensor]]:
        sends = [dist.isend(one, group=self.group, group_dst=to) for one in sent if len(one)]
        for number, length in enumerate(wanted):
            if length:
                received = torch.empty(length, dtype=dtype)
                dist.recv(received, group=self.group, group_src=by)
                yield number, slice(0, length), received
        for send in sends:
            assert send is not None, "a rank of the group"
            send.wait()


def _messages(lengths: Sequence[int], limit: int) -> Iterator[list[_Span]]:
    """Tensors of these lengths in messages of at most `limit` elements."""
    message, room = list[_Span](), limit
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            message.append((number, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield message
                message, room = [], limit
    if message:
        yield message
