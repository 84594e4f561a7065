"""Plain tensors as a source or a destination: parameters by name, read and written through strided views."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aligner.reshard.region import Layout, Piece


def strided_view(storage: Tensor, piece: Piece) -> Tensor:
    """`piece` as a view of its storage.

    Strides count from the start of a contiguous tensor; of a transposed or sliced one they would read garbage, so
    that is refused.
    """
    assert storage.is_contiguous(), f"{piece.storage} is not contiguous: its strides are {storage.stride()}"
    assert str(storage.dtype) == f"torch.{piece.dtype}", (
        f"{piece.storage} is {storage.dtype}, its layout says {piece.dtype}"
    )
    return storage.detach().as_strided(piece.size, piece.stride, storage.storage_offset() + piece.offset)


class Storages:
    """Contiguous tensors by storage name; as a `Destination` it checks that all of `layout` is written exactly once."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        self._tensors = tensors
        self._missing: dict[str, int] = {}
        self._names: dict[str, str] = {}
        for piece in layout:
            self._missing[piece.storage] = self._missing.get(piece.storage, 0) + piece.elements
            self._names.setdefault(piece.storage, piece.name)

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self._tensors[piece.storage], piece)

    def written(self, piece: Piece) -> None:
        self._missing[piece.storage] -= piece.elements

    def finish(self) -> None:
        wrong = {storage: count for storage, count in self._missing.items() if count}
        if wrong:
            storage, count = next(iter(wrong.items()))
            what = f"{count} elements were not written" if count > 0 else f"{-count} elements were written twice"
            raise RuntimeError(f"reshard: {storage} ({self._names[storage]}): {what}")


def allocate(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Zeroed flat storages that hold every piece of `layout`."""
    ends: dict[str, tuple[int, str]] = {}
    for piece in layout:
        last = piece.offset + sum((extent - 1) * step for extent, step in zip(piece.size, piece.stride, strict=True))
        ends[piece.storage] = (max(ends.get(piece.storage, (0, ""))[0], last + 1), piece.dtype)
    return {name: torch.zeros(end, dtype=getattr(torch, dtype), device=device) for name, (end, dtype) in ends.items()}
