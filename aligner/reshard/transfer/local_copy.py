"""Regions that a rank needs and holds itself: copied and cast from storage to storage, without a message."""

from __future__ import annotations

from collections.abc import Sequence

from aligner.reshard.message.chunked_copy import Scratch, copy, copy_proven, on_cpu
from aligner.reshard.message.proof import STORAGE, View, differing_pairs, mismatch, views_of
from aligner.reshard.plan.transfer_plan import Item


def copy_local(items: Sequence[Item], source: View, view: View, rank: int, proof: bool, scratch: Scratch) -> None:
    """Copy and cast from storage to storage on one rank, without a message.

    With `proof` the destinations, looked up again, are compared bit for bit with what was written: on the CPU each chunk
    while it is in the cache. RuntimeError names the first that differs.
    """
    reads, held = views_of(source, items, from_source=True), views_of(view, items)
    again = views_of(view, items) if proof else held
    if proof and on_cpu([*reads, *held, *again]):
        wrong = [n for n, views in enumerate(zip(held, again, reads, strict=True)) if not copy_proven(*views, scratch)]
    else:
        for written, read in zip(held, reads, strict=True):
            copy(written, read, scratch)
        wrong = differing_pairs(list(zip(again, reads, strict=True))) if proof else []
    if wrong:
        raise mismatch(items, wrong, rank, rank, STORAGE)
