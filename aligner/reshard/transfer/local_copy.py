"""Regions that a rank needs and holds itself: copied and cast from storage to storage, without a message."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aligner.reshard.message.chunked_copy import ChunkBuffers, copy, copy_verified
from aligner.reshard.message.proof import (
    STORAGE,
    View,
    Written,
    differing_pairs,
    mismatch,
    not_followed,
    view_of,
)
from aligner.reshard.plan.transfer_plan import Item


def copy_local(
    items: Sequence[Item],
    source: View,
    destination: View,
    rank: int,
    proof: bool,
    chunk_buffers: ChunkBuffers,
    written: Written = not_followed,
) -> None:
    """Copy and cast from storage to storage on one rank, without a message.

    With `proof` the destinations, looked up again, are compared bit for bit with what was written: on the CPU each chunk
    while it is in the cache. RuntimeError names the first that differs.

    Args:
        written: told of items once they have been written and, with `proof`, found right.
    """
    wrong, on_device, pairs = list[int](), list[int](), list[tuple[Tensor, Tensor]]()
    for number, item in enumerate(items):
        read, write = view_of(source, item, from_source=True), view_of(destination, item)
        readback = view_of(destination, item) if proof else write
        if not (read.is_cpu and write.is_cpu and readback.is_cpu):
            copy(write, read, chunk_buffers)
            on_device.append(number)
            pairs.append((readback, read))
        elif proof and not copy_verified(write, readback, read, chunk_buffers):
            wrong.append(number)
        elif not wrong:
            if not proof:
                copy(write, read, chunk_buffers)
            written(items[number : number + 1])  # at once, so that the engine packs a module while it is in the cache
    if proof:
        wrong += [on_device[number] for number in differing_pairs(pairs)]
    if wrong:
        raise mismatch(items, sorted(wrong), rank, rank, STORAGE)
    if on_device:
        written([items[number] for number in on_device])
