"""What ranks do in the export tests: each reads its TP2 x PP2 part of a model and writes it back with its peers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate
from aligner.reshard.plan.region import Layout
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.megatron.layout import MegatronLayout

FILE_BYTES = {"float32": 60_000, "bfloat16": 1 << 30}


class Held:
    """A model over all ranks, and what this rank has of it."""

    def __init__(self, world: World, spec: ModelSpec, tensor: int, pipeline: int = 1) -> None:
        side = MegatronLayout(spec, Mesh(tuple(range(world.size)), tensor, pipeline), "float32")
        self.layouts: dict[int, Layout] = {rank: side.layout(rank) for rank in side.ranks}
        mine = self.layouts[world.rank]
        self.weights = TensorWeights(allocate(mine, torch.device("cpu")), mine)


def export(world: World, model: Path, dtype: str, target: Path) -> dict[str, float]:
    """Twice, of which the second replaces the first; the statistics of the second."""
    spec = read_spec(model)
    held = Held(world, spec, tensor=2, pipeline=2)
    read_into(spec, held.layouts[world.rank], held.weights.view)
    for _ in range(2):
        row = export_checkpoint(
            world.rank,
            held.layouts,
            held.weights.view,
            dist.group.WORLD,
            target,
            spec,
            dtype,
            bucket_bytes=9000,
            file_bytes=FILE_BYTES[dtype],
        )
    return row.metrics()


def failed_export(world: World, model: Path, target: Path, unreadable_on: int | None) -> str:
    """What this rank is told. The weights of rank `unreadable_on` are gone."""
    spec = read_spec(model)
    held = Held(world, spec, tensor=2)
    lost = TensorWeights({}, held.layouts[world.rank])
    view = lost.view if world.rank == unreadable_on else held.weights.view
    try:
        export_checkpoint(world.rank, held.layouts, view, dist.group.WORLD, target, spec, "float32")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
