"""Messages between ranks, over the world's own connections: host memory, gloo.

Every rank issues the same transfers in the same order (lockstep), and within one exchange all receives are posted
before anything is waited for, so no two ranks can wait for each other. Each message carries the sender's call number
and its digest: a rank that is somewhere else in the loop is found at the first message.

What many ranks need goes by trees: a rank sends and receives log2(ranks) messages at most, never one for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from aligner.health.journal import Journal
from aligner.health.timeline import STEP_END, Timeline
from aligner.spmd.serialization import ALIGN, Bytes, deserialize, frame, serialize, unframe

T = TypeVar("T")
INLINE = 4096 - ALIGN
"""A payload of at most so many bytes travels with its header, as one message."""


class Channel(Protocol):
    """The ranks that exchange messages, as one of them sees it: the `World`."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """Ranks of the world."""
        ...

    @property
    def journal(self) -> Journal:
        """This rank's role calls; each message carries the number and digest of the last one."""
        ...

    @property
    def timeline(self) -> Timeline:
        """Records the time that messages take."""
        ...


def exchange(
    world: Channel, outgoing: Mapping[int, Bytes], incoming: Sequence[int], label: str = "values"
) -> dict[int, Bytes]:
    """Send `outgoing[peer]`, receive one message from each rank of `incoming`."""
    peers = sorted({*outgoing, *incoming})
    if not peers:
        return {}
    with world.timeline.span("wait", label, peers):
        return _exchange(world, outgoing, incoming)


def _exchange(world: Channel, outgoing: Mapping[int, Bytes], incoming: Sequence[int]) -> dict[int, Bytes]:
    stamp = world.journal.stamp()
    heads = {peer: np.empty(ALIGN + INLINE, np.uint8) for peer in incoming}
    receives: list[Any] = [dist.irecv(torch.from_numpy(head), peer) for peer, head in heads.items()]
    pending: list[Any] = []
    kept = []
    for peer, payload in outgoing.items():
        head = np.empty(ALIGN + INLINE, np.uint8)
        head[:24].view(np.int64)[:] = (payload.size, *stamp)
        messages = [torch.from_numpy(head)]
        if payload.size <= INLINE:
            head[ALIGN : ALIGN + payload.size] = payload
        else:
            messages.append(torch.from_numpy(payload))
        kept += messages
        pending += [dist.isend(message, peer) for message in messages]
    bodies = {}
    for (peer, head), work in zip(heads.items(), receives, strict=True):
        work.wait()
        size, *peer_stamp = head[:24].view(np.int64).tolist()
        if tuple(peer_stamp) != stamp:
            world.journal.disagree(peer, peer_stamp[0])
        if size <= INLINE:
            bodies[peer] = head[ALIGN : ALIGN + size]
        else:
            bodies[peer] = torch.empty(size, dtype=torch.uint8).numpy()
            pending.append(dist.irecv(torch.from_numpy(bodies[peer]), peer))
    for work in pending:
        work.wait()
    return bodies


def broadcast(world: Channel, value: Any, holders: Sequence[int], readers: Sequence[int]) -> Any:
    """`value` of the holders on each of `readers`: whoever has it passes it on, so that each round doubles them.

    Every rank of the world calls it, with the same holders and readers.

    Returns:
        The value on holders and readers, None elsewhere.
    """
    have = list(holders)
    holding = set(have)
    lack = [rank for rank in readers if rank not in holding]
    message = None
    while lack:
        next_ones, lack = lack[: len(have)], lack[len(have) :]
        for source, to in zip(have, next_ones, strict=False):
            if world.rank == source:
                message = serialize(value) if message is None else message
                exchange(world, {to: message}, ())
            elif world.rank == to:
                message = exchange(world, {}, (source,))[source]
                value = deserialize(message)
        have += next_ones
    return value


def all_gather(world: Channel, value: Any, ranks: Sequence[int]) -> list[Any]:
    """Each rank's value on all of `ranks`, in their order; a collective of `ranks`, which hold the caller.

    In round k a rank passes all that it has to the rank 2^k before it (Bruck et al. 1997): log2(ranks) messages, and
    no rank receives a value twice. Equal values of several ranks may be one object.
    """
    size, place = len(ranks), ranks.index(world.rank)
    blocks = [serialize(value)]
    while len(blocks) < size:
        reach = len(blocks)
        to, source = ranks[(place - reach) % size], ranks[(place + reach) % size]
        received = exchange(world, {to: frame(blocks[: size - reach])}, (source,))
        blocks += unframe(received[source])
    deserialized: dict[bytes, Any] = {}  # ranks often have equal values
    values = [value]
    for block in blocks[1:]:
        key = block.tobytes() if block.size <= INLINE else b""
        if key in deserialized:
            values.append(deserialized[key])
            continue
        values.append(deserialize(block))
        if key:
            deserialized[key] = values[-1]
    return [values[(i - place) % size] for i in range(size)]


def reduce_to_rank0(world: Channel, value: T, merge: Callable[[T, T], T]) -> T | None:
    """Every rank's value merged on rank 0, in rank order, up a binomial tree; None elsewhere.

    Args:
        merge: associative; gets the values of lower ranks first.
    """
    rank, size = world.rank, world.size
    below = []
    reach = 1
    while not rank & reach and rank + reach < size:
        below.append(rank + reach)
        reach *= 2
    received = exchange(world, {}, below, STEP_END)
    for child in below:
        value = merge(value, deserialize(received[child]))
    if rank == 0:
        return value
    exchange(world, {rank & (rank - 1): serialize(value)}, (), STEP_END)
    return None
