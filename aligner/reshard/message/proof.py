"""Whether storages hold what they should, bit for bit: views of the items' pieces, their comparison, the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.reshard.plan.transfer_plan import Item

_BITS = {2: torch.int16, 4: torch.int32}
STORAGE = "after the write {destination} does not hold what {source} held"

View = Callable[[Piece], Tensor]
"""Gives a piece of this rank's storages as a strided view of shape `piece.size`."""


def differing_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Which of the pairs (held, expected) differ in any bit, once `expected` is cast to the dtype of what is held."""
    # One look at all: each would wait for the device.
    found = [_bits(held) != _bits(expected.to(held.device, held.dtype)) for held, expected in pairs]
    return torch.stack([differ.any() for differ in found]).nonzero().view(-1).tolist() if found else []


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def views_of(view: View, items: Sequence[Item], from_source: bool = False) -> list[Tensor]:
    """The destination pieces of these items, or their source pieces, each of shape `item.size`."""
    found = [view(item.source if from_source else item.destination) for item in items]
    for item, tensor in zip(items, found, strict=True):
        assert tensor.shape == item.size, f"{item}: got a view of shape {tuple(tensor.shape)}"
    return found


def mismatch(items: Sequence[Item], wrong: Sequence[int], by: int, to: int, what: str) -> RuntimeError:
    """The error that names the first of the `wrong` items, sent by rank `by` to rank `to`; `what` may name both storages."""
    item = items[wrong[0]]
    told = what.format(source=item.source.storage, destination=item.destination.storage)
    return RuntimeError(
        f"reshard: checksum mismatch in {item} from rank {by} to rank {to}: {told} "
        f"({len(wrong)} of {len(items)} regions in this bucket differ)"
    )
