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
    """A checkpoint that is open."""

    def entries(self, key: str) -> Iterable[tuple[int, Entry]]:
        """(rank that wrote it, piece) of everything that was saved under `key`."""

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor of that rank's file, mapped."""


def save(name: str, engine: TrainEngine) -> tuple[dict[str, Tensor], dict[str, list[Entry]]]:
    """What a checkpoint keeps of a role's engine, whatever its layout.

    Args:
        name: of the role.

    Returns:
        (this rank's tensors: float32, flat, as they are in memory; by key, which regions of them it is to write). The
        tensors are copies on the host: training may go on while they are written.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, list[Entry]] = {f"{name}/{kind}": [] for kind in (MASTER, *MOMENTS)}
    by_storage = _by_storage(engine.weights.pieces())
    for part in engine.optimizer_slices():
        pieces = [
            clipped
            for piece in by_storage.get(part.storage, ())
            if engine.saves(piece)
            for clipped in clip(piece, part.start, part.stop)
        ]
        for kind, tensor in ({MASTER: part.master} | part.moments).items() if pieces else ():
            key = f"{name}/{kind}/{part.storage}"
            tensors[key] = tensor.detach().to("cpu", copy=True)
            entries[f"{name}/{kind}"] += [entry_of(replace(piece, storage=key)) for piece in pieces]
    return tensors, entries


def load(name: str, engine: TrainEngine, source: Source, steps: int) -> None:
    """Weights, masters and moments as they were after `steps` optimizer steps, whatever layout or engine wrote them."""
    engine.reset_moments(steps)
    weights, slices = engine.weights, engine.optimizer_slices()
    pieces = weights.pieces()
    _read(source, f"{name}/{MASTER}", pieces, weights.view)
    layout = _of_slices(slices, pieces)
    for kind in (MASTER, *(MOMENTS if steps else ())):
        if kind == MASTER and all(piece.dtype == "float32" for piece in pieces):  # their own masters
            continue
        flat = {part.storage: part.master if kind == MASTER else part.moments[kind] for part in slices}
        _read(source, f"{name}/{kind}", layout, partial(_in_flat, flat))


def read_masters(spec: ModelSpec, engine: TrainEngine) -> None:
    """Fill float32 masters of bfloat16 weights from the model's folder, where that has more digits: an engine makes them
    from the weights, and so from what rounding has left."""
    slices = engine.optimizer_slices()
    layout = _of_slices(slices, engine.weights.pieces())
    with open_stored(spec) as stored:
        new = new_tensors(spec)
        pieces = stored.layout(dict.fromkeys(piece.name for piece in layout if piece.name not in new))
    if any(piece.dtype != "bfloat16" for piece in pieces):
        read_into(spec, layout, partial(_in_flat, {part.storage: part.master for part in slices}))


def _of_slices(slices: Sequence[OptimizerSlice], pieces: Layout) -> list[Piece]:
    """Which region each of the optimizer's flat ranges holds, in float32."""
    by_storage = _by_storage(pieces)
    return [
        clipped
        for part in slices
        for piece in by_storage.get(part.storage, ())
        for clipped in clip(_as_float32(piece), part.start, part.stop)
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
    wanted = {piece.name for piece in layout}
    held = [piece_of(entry, rank, "float32") for rank, entry in source.entries(key) if entry[0] in wanted]

    def stored_view(piece: Piece) -> Tensor:
        rank, _, name = piece.storage.partition(":")
        return strided_view(source.tensor(int(rank), name), piece)

    copy_weights(LocalWeights(held, stored_view), WritableLocalWeights(layout, view), verify=False)
