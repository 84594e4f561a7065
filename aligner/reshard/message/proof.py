"""Whether storages hold what they should, bit for bit: views of the items' pieces, their comparison, the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.reshard.plan.transfer_plan import Item

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
STORAGE = "after the write {destination} does not hold what {source} held"

View = Callable[[Piece], Tensor]
"""Gives a piece of this rank's storages as a strided view of shape `piece.size`."""

Written = Callable[[Sequence[Item]], None]
"""Called with items whose destinations have been written and, where there is a proof, found right."""


def not_followed(_: Sequence[Item]) -> None:
    """The `Written` that does nothing."""


def differing_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Which of the pairs (held, expected) differ in any bit, once `expected` is cast to the dtype of what is held."""
    # One read for all: each read waits for the device.
    differing = [_bits(held) != _bits(expected.to(held.device, held.dtype)) for held, expected in pairs]
    return torch.stack([bits.any() for bits in differing]).nonzero().view(-1).tolist() if differing else []


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def views_of(view: View, items: Sequence[Item], from_source: bool = False) -> list[Tensor]:
    """The destination pieces of these items, or their source pieces, each of shape `item.size`."""
    return [view_of(view, item, from_source) for item in items]


def view_of(view: View, item: Item, from_source: bool = False) -> Tensor:
    """The destination piece of this item, or its source piece, of shape `item.size`."""
    tensor = view(item.source if from_source else item.destination)
    assert tensor.shape == item.size, f"{item}: got a view of shape {tuple(tensor.shape)}"
    return tensor


def mismatch(items: Sequence[Item], wrong: Sequence[int], sender: int, receiver: int, reason: str) -> RuntimeError:
    """The error that names the first of the `wrong` items, sent by rank `sender` to rank `receiver`; `reason` may name both storages."""
    item = items[wrong[0]]
    reason = reason.format(source=item.source.storage, destination=item.destination.storage)
    return RuntimeError(
        f"reshard: checksum mismatch in {item} from rank {sender} to rank {receiver}: {reason} "
        f"({len(wrong)} of {len(items)} regions in this bucket differ)"
    )
