"""Regions that a rank needs and holds itself: copied and cast from storage to storage, without a message."""

from __future__ import annotations

from collections.abc import Sequence

from aligner.reshard.message.chunked_copy import ChunkBuffers, copy, copy_verified, on_cpu
from aligner.reshard.message.proof import STORAGE, View, differing_pairs, mismatch, views_of
from aligner.reshard.plan.transfer_plan import Item


def copy_local(
    items: Sequence[Item], source: View, destination: View, rank: int, proof: bool, chunk_buffers: ChunkBuffers
) -> None:
    """Copy and cast from storage to storage on one rank, without a message.

    With `proof` the destinations, looked up again, are compared bit for bit with what was written: on the CPU each chunk
    while it is in the cache. RuntimeError names the first that differs.
    """
    reads, writes = views_of(source, items, from_source=True), views_of(destination, items)
    readbacks = views_of(destination, items) if proof else writes
    if proof and on_cpu([*reads, *writes, *readbacks]):
        wrong = [
            n
            for n, views in enumerate(zip(writes, readbacks, reads, strict=True))
            if not copy_verified(*views, chunk_buffers)
        ]
    else:
        for write, read in zip(writes, reads, strict=True):
            copy(write, read, chunk_buffers)
        wrong = differing_pairs(list(zip(readbacks, reads, strict=True))) if proof else []
    if wrong:
        raise mismatch(items, wrong, rank, rank, STORAGE)
