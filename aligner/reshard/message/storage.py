"""Pieces as strided views of contiguous storages: which elements they are, and that no two share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aligner.reshard.plan.region import STORED_BYTES, Layout, Piece

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORED_BYTES}


def strided_view(storage: Tensor, piece: Piece) -> Tensor:
    """`piece` as a view of its storage.

    Strides count from the start of a contiguous tensor; of a transposed or sliced one they would read garbage, so
    that is refused.
    """
    assert storage.is_contiguous(), f"{piece.storage} is not contiguous: its strides are {storage.stride()}"
    assert storage.dtype == _DTYPES[piece.dtype], f"{piece.storage} is {storage.dtype}, its layout says {piece.dtype}"
    plain = storage.detach() if storage.requires_grad else storage
    return plain.as_strided(piece.size, piece.stride, storage.storage_offset() + piece.offset)


def check_disjoint(layout: Layout, device: torch.device | None = None) -> None:
    """ValueError, with the storage and both tensors, where two pieces, or one with itself, share an element.

    Exact. Where pieces interleave (columns beside columns) their elements are marked on `device` (default: CPU), a byte
    for each element of their common span; rows beside rows need no memory.
    """
    storages: dict[str, list[Piece]] = {}
    for piece in layout:
        if piece.elements:
            storages.setdefault(piece.storage, []).append(piece)
    for pieces in storages.values():
        for cluster in _interleaved(sorted(pieces, key=lambda piece: piece.offset)):
            if len(cluster) > 1 or not _nests(cluster[0]):
                _check_marks(cluster, device)


def _interleaved(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces by ascending offset, those together whose spans of the storage overlap."""
    cluster: list[Piece] = []
    end = 0
    for piece in pieces:
        if cluster and piece.offset >= end:
            yield cluster
            cluster = []
        cluster.append(piece)
        end = max(end, _end(piece))
    if cluster:
        yield cluster


def _nests(piece: Piece) -> bool:
    """Whether its strides nest, each beyond all that the smaller ones reach: then no two elements share a place."""
    reach = 0
    for step, extent in sorted(zip(piece.stride, piece.size, strict=True)):
        if extent > 1:
            if step <= reach:
                return False
            reach += step * (extent - 1)
    return True


def _check_marks(pieces: Sequence[Piece], device: torch.device | None) -> None:
    start = pieces[0].offset
    marks = torch.zeros(max(map(_end, pieces)) - start, dtype=torch.bool, device=device)
    for number, piece in enumerate(pieces):
        view = marks.as_strided(piece.size, piece.stride, piece.offset - start)
        before = int(marks.count_nonzero())
        hit = bool(view.any())
        view.fill_(True)
        if not hit and int(marks.count_nonzero()) == before + piece.elements:
            continue
        other = next((former for former in pieces[:number] if hit and _share(former, piece, marks, start)), piece)
        raise ValueError(
            f"reshard: {piece.storage} holds {other.name}{other.box} and {piece.name}{piece.box} in the same elements"
        )


def _share(former: Piece, other: Piece, marks: Tensor, start: int) -> bool:
    marks.zero_()
    marks.as_strided(former.size, former.stride, former.offset - start).fill_(True)
    return bool(marks.as_strided(other.size, other.stride, other.offset - start).any())


def _end(piece: Piece) -> int:
    """The place after a piece's last element."""
    return piece.offset + sum((n - 1) * step for n, step in zip(piece.size, piece.stride, strict=True)) + 1


def allocate(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Zeroed flat storages that hold every piece of `layout`."""
    ends: dict[str, tuple[int, str]] = {}
    for piece in layout:
        ends[piece.storage] = (max(ends.get(piece.storage, (0, ""))[0], _end(piece)), piece.dtype)
    return {name: torch.zeros(end, dtype=getattr(torch, dtype), device=device) for name, (end, dtype) in ends.items()}
