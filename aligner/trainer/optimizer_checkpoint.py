"""Weights and optimizer state of a role in a checkpoint: loadable under any parallel layout and by any training backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from aligner.models.checkpoint import read_into
from aligner.models.stored import Entry, entry_of, open_stored, piece_of
from aligner.models.tensors import new_tensors
from aligner.reshard.local import LocalWeights, WritableLocalWeights, copy_weights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Layout, Piece
from aligner.trainer.engine import MASTER, MOMENTS, OptimizerSlice, TrainEngine
from aligner.trainer.flat_range import clip

if TYPE_CHECKING:
    from collections.abc import Callable

    from aligner.models.spec import ModelSpec


class Source(Protocol):
    """An open checkpoint."""

    def entries(self, key: str) -> Iterable[tuple[int, Entry]]:
        """(rank that wrote it, piece) of all that was saved under `key`."""

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor of that rank's file, memory-mapped."""


def save(name: str, engine: TrainEngine) -> tuple[dict[str, Tensor], dict[str, list[Entry]]]:
    """Master weights and moments of a role's engine, by region, so that any layout can load them.

    Args:
        name: the role's name.

    Returns:
        (this rank's tensors: float32, flat, as in memory; by key, the regions of them that it writes). The tensors are
        copies on the host: training may continue while they are written.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, list[Entry]] = {f"{name}/{kind}": [] for kind in (MASTER, *MOMENTS)}
    by_storage = _by_storage(engine.weights.pieces())
    for slice_ in engine.optimizer_slices():
        pieces = [
            clipped
            for piece in by_storage.get(slice_.storage, ())
            if engine.saves(piece)
            for clipped in clip(piece, slice_.start, slice_.stop)
        ]
        for kind, tensor in ({MASTER: slice_.master} | slice_.moments).items() if pieces else ():
            key = f"{name}/{kind}/{slice_.storage}"
            tensors[key] = tensor.detach().to("cpu", copy=True)
            entries[f"{name}/{kind}"] += [entry_of(replace(piece, storage=key)) for piece in pieces]
    return tensors, entries


def load(name: str, engine: TrainEngine, source: Source, steps: int) -> None:
    """Weights, masters and moments as they were after `steps` optimizer steps, whatever layout or engine wrote them."""
    engine.reset_moments(steps)
    weights, slices = engine.weights, engine.optimizer_slices()
    pieces = weights.pieces()
    _read(source, f"{name}/{MASTER}", pieces, weights.view)
    layout = _slice_pieces(slices, pieces)
    for kind in (MASTER, *(MOMENTS if steps else ())):
        if kind == MASTER and all(piece.dtype == "float32" for piece in pieces):  # they are their own masters
            continue
        flat = {slice_.storage: slice_.master if kind == MASTER else slice_.moments[kind] for slice_ in slices}
        _read(source, f"{name}/{kind}", layout, partial(_in_flat, flat))


def read_masters(spec: ModelSpec, engine: TrainEngine) -> None:
    """Read float32 masters of bfloat16 weights from the model's folder, if that is not bfloat16: an engine copies them from
    the weights, which are rounded."""
    slices = engine.optimizer_slices()
    layout = _slice_pieces(slices, engine.weights.pieces())
    with open_stored(spec) as stored:
        new = new_tensors(spec)
        pieces = stored.layout(dict.fromkeys(piece.name for piece in layout if piece.name not in new))
    if any(piece.dtype != "bfloat16" for piece in pieces):
        read_into(spec, layout, partial(_in_flat, {slice_.storage: slice_.master for slice_ in slices}))


def _slice_pieces(slices: Sequence[OptimizerSlice], pieces: Layout) -> list[Piece]:
    """The regions that the optimizer's flat ranges hold, as float32 pieces."""
    by_storage = _by_storage(pieces)
    return [
        clipped
        for slice_ in slices
        for piece in by_storage.get(slice_.storage, ())
        for clipped in clip(_as_float32(piece), slice_.start, slice_.stop)
    ]


def _by_storage(layout: Layout) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for piece in layout:
        pieces.setdefault(piece.storage, []).append(piece)
    return pieces


def _in_flat(flat: Mapping[str, Tensor], piece: Piece) -> Tensor:
    return strided_view(flat[piece.storage], piece)


def _as_float32(piece: Piece) -> Piece:
    return Piece(piece.name, piece.lo, piece.size, piece.storage, piece.offset, piece.stride, "float32")


@torch.no_grad()
def _read(source: Source, key: str, layout: Layout, view: Callable[[Piece], Tensor]) -> None:
    names = {piece.name for piece in layout}
    stored_pieces = [piece_of(entry, rank, "float32") for rank, entry in source.entries(key) if entry[0] in names]

    def stored_view(piece: Piece) -> Tensor:
        rank, _, name = piece.storage.partition(":")
        return strided_view(source.tensor(int(rank), name), piece)

    copy_weights(LocalWeights(stored_pieces, stored_view), WritableLocalWeights(layout, view), verify=False)
