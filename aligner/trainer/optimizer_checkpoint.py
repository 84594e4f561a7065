"""A trained role's part of a checkpoint: its tensors with the regions that they hold, and back under another layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from aligner.models.checkpoint import read_into
from aligner.models.family import new_tensors
from aligner.models.stored import open_stored
from aligner.reshard.local import LocalWeights, WritableLocalWeights, copy_weights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Layout, Piece
from aligner.trainer.megatron.layout import MegatronLayout
from aligner.trainer.megatron.optimizer_state import MOMENTS, WEIGHTS, Slice, clip, make_moments, slices, written_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from aligner.trainer.megatron.optimizer import Optimizer
    from aligner.trainer.trainable_role import TrainableRole

Entry = tuple[str, list[int], list[int], str, int, list[int]]
"""A piece as JSON: logical tensor, first element, extent, tensor of the file, offset in it, strides."""


class Source(Protocol):
    """A checkpoint that is open."""

    def entries(self, key: str) -> Iterable[tuple[int, Entry]]:
        """(rank that wrote it, piece) of everything that was saved under `key`."""

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor of that rank's file, mapped."""


def save(role: TrainableRole) -> tuple[dict[str, Tensor], dict[str, list[Entry]]]:
    """This rank's tensors (float32, flat, as they are in memory) and, by key, which regions of them it is to write.

    The tensors are copies on the host: training may go on while they are written.
    """
    optimizer, model = role.optimizer, role.model
    side = MegatronLayout(role.spec, role.mesh, "float32")
    mine = written_by(role.world.rank, side, role.spec, role.mesh, role.config.optimizer.distributed)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, list[Entry]] = {f"{role.name}/{kind}": [] for kind in (WEIGHTS, *MOMENTS)}
    by_storage = _by_storage(model.layout)
    for part in slices(optimizer, model):
        pieces = [
            kept
            for piece in by_storage.get(part.storage, ())
            if (piece.name, piece.storage) in mine
            for kept in clip(piece, part.start, part.stop)
        ]
        for kind, tensor in ({WEIGHTS: part.master} | part.moments).items() if pieces else ():
            name = f"{role.name}/{kind}/{part.storage}"
            tensors[name] = tensor.detach().to("cpu", copy=True)
            entries[f"{role.name}/{kind}"] += [
                (p.name, list(p.lo), list(p.size), name, p.offset, list(p.stride)) for p in pieces
            ]
    return tensors, entries


def load(role: TrainableRole, source: Source, steps: int) -> None:
    """Weights, masters and moments as they were after `steps` optimizer steps, whatever layout wrote them."""
    model, optimizer = role.model, role.optimizer
    make_moments(optimizer, steps)
    _read(source, f"{role.name}/{WEIGHTS}", model.layout, model.view)
    held = slices(optimizer, model)
    layout = _of_slices(held, model.layout)
    for kind in (WEIGHTS, *(MOMENTS if steps else ())):
        if kind == WEIGHTS and role.config.dtype == "float32":  # its own master
            continue
        flat = {part.storage: part.master if kind == WEIGHTS else part.moments[kind] for part in held}
        _read(source, f"{role.name}/{kind}", layout, partial(_in_flat, flat))


def read_masters(role: TrainableRole, optimizer: Optimizer) -> None:
    """Masters of bf16 parameters from the model's folder, where that has more digits: Megatron makes them from the
    parameters, and so from what rounding has left."""
    held = slices(optimizer, role.model)
    layout = _of_slices(held, role.model.layout)
    with open_stored(role.spec) as stored:
        new = new_tensors(role.spec)
        pieces = stored.layout(dict.fromkeys(piece.name for piece in layout if piece.name not in new))
    if any(piece.dtype != "bfloat16" for piece in pieces):
        read_into(role.spec, layout, partial(_in_flat, {part.storage: part.master for part in held}))


def _of_slices(held: Sequence[Slice], pieces: Layout) -> list[Piece]:
    """Which region each of the optimizer's flat ranges holds, in float32."""
    by_storage = _by_storage(pieces)
    return [
        kept
        for part in held
        for piece in by_storage.get(part.storage, ())
        for kept in clip(_as_float32(piece), part.start, part.stop)
    ]


def _by_storage(layout: Layout) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in layout:
        found.setdefault(piece.storage, []).append(piece)
    return found


def _in_flat(flat: Mapping[str, Tensor], piece: Piece) -> Tensor:
    return strided_view(flat[piece.storage], piece)


def _as_float32(piece: Piece) -> Piece:
    return Piece(piece.name, piece.lo, piece.size, piece.storage, piece.offset, piece.stride, "float32")


@torch.no_grad()
def _read(source: Source, key: str, layout: Layout, view: Callable[[Piece], Tensor]) -> None:
    wanted = {piece.name for piece in layout}
    held = [
        Piece(name, tuple(lo), tuple(size), f"{rank}:{stored}", offset, tuple(stride), "float32")
        for rank, (name, lo, size, stored, offset, stride) in source.entries(key)
        if name in wanted
    ]

    def stored_view(piece: Piece) -> Tensor:
        rank, _, name = piece.storage.partition(":")
        return strided_view(source.tensor(int(rank), name), piece)

    copy_weights(LocalWeights(held, stored_view), WritableLocalWeights(layout, view), verify=False)
