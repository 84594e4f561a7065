"""What training has made of a model, as regions of logical tensors: fp32 weights and Adam's moments, under any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aligner.models.tensors import LAYER, split_expert
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import AXES, EXPERT_AXES, Mesh
from aligner.trainer.megatron.layout import MegatronLayout

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.trainer.megatron.model import ShardedModel
    from aligner.trainer.megatron.optimizer import Optimizer

WEIGHTS, MOMENTS = "param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """A flat range of one parameter whose optimizer state this rank has."""

    storage: str
    start: int
    stop: int
    master: Tensor
    """[stop - start] float32; of an fp32 model a view of the parameter itself."""
    moments: dict[str, Tensor]
    """Like `master`; empty before the first step."""


def slices(optimizer: Optimizer, model: ShardedModel) -> list[Slice]:
    """Everything that this rank's optimizer holds."""
    names = {id(parameter): name for name, parameter in model.parameters.items()}
    return [
        Slice(names[id(parameter)], start, stop, master.data.view(-1), _moments(inner, master))
        for inner, parameter, start, stop, master in _masters(optimizer)
    ]


def _masters(optimizer: Optimizer) -> Iterator[tuple[Any, Any, int, int, Any]]:
    """(torch's optimizer, Megatron's parameter, range of it, fp32 master), of each optimizer in the chain."""
    whole: Any = optimizer.inner
    for one in getattr(whole, "chained_optimizers", [whole]):
        inner = one.optimizer
        if inner is None:  # an expert-parallel rank may have nothing to optimise
            continue
        if hasattr(one, "model_param_gbuf_map"):  # distributed: each data rank has a part of each flat buffer
            for parameter in one.model_param_gbuf_map:
                group, place = one.model_param_group_index_map[parameter]
                held = one._get_model_param_range_map(parameter)["param"]
                yield inner, parameter, held.start, held.end, inner.param_groups[group]["params"][place]
        elif hasattr(one, "float16_groups"):
            halves = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
            pairs = [pair for models, masters in halves for pair in zip(models, masters, strict=True)]
            pairs += [(p, p) for group in one.fp32_from_fp32_groups for p in group]
            for parameter, master in pairs:
                yield inner, parameter, 0, parameter.numel(), master
        else:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                yield inner, parameter, 0, parameter.numel(), parameter


def _moments(inner: Any, master: Any) -> dict[str, Tensor]:
    state = inner.state.get(master, {})
    return {name: state[name].view(-1) for name in MOMENTS if name in state}


def make_moments(optimizer: Optimizer, steps: int) -> None:
    """Adam's state as after `steps` steps, its moments zero: what a checkpoint's are written into.

    torch's Adam counts the steps of each parameter one by one, so each has a tensor of its own; fused ones (apex,
    TransformerEngine) have a number in each group.
    """
    for inner, _, _, _, master in _masters(optimizer):
        if not steps:
            continue
        inner.state[master] = {name: torch.zeros_like(master) for name in MOMENTS}
        if isinstance(inner, torch.optim.Adam):
            inner.state[master]["step"] = torch.tensor(float(steps))
        else:
            for group in inner.param_groups:
                group["step"] = steps


def clip(piece: Piece, start: int, stop: int) -> list[Piece]:
    """The parts of a piece that lie in the flat range start..stop-1 of its storage; their offsets count from `start`.

    Of a matrix these are a part of a row, whole rows, and a part of a row, at most. The piece's strides must nest.
    """
    dims = sorted(range(len(piece.size)), key=lambda dim: -piece.stride[dim])
    boxes = _inside(piece, dims, piece.lo, piece.size, start - piece.offset, stop - piece.offset)
    found = [piece.crop(lo, size) for lo, size in boxes]
    return [Piece(p.name, p.lo, p.size, p.storage, p.offset - start, p.stride, p.dtype) for p in found]


Corner = tuple[int, ...]


def _inside(
    piece: Piece, dims: Sequence[int], lo: Corner, size: Corner, start: int, stop: int
) -> Iterator[tuple[Corner, Corner]]:
    """The boxes inside (lo, size) whose elements have places start..stop-1, counted from the first one's."""
    reach = sum((size[dim] - 1) * piece.stride[dim] for dim in dims)
    if min(size, default=1) < 1 or reach < start or stop <= 0:
        return
    if start <= 0 and reach < stop:
        yield lo, size
        return
    dim, *rest = dims
    step, row = piece.stride[dim], reach - (size[dim] - 1) * piece.stride[dim]
    touched = range(max(0, -(-(start - row) // step)), min(size[dim], (stop - 1) // step + 1))
    whole = range(max(0, -(-start // step)), min(size[dim], (stop - 1 - row) // step + 1))

    def rows(at: int, count: int) -> tuple[Corner, Corner]:
        return (*lo[:dim], lo[dim] + at, *lo[dim + 1 :]), (*size[:dim], count, *size[dim + 1 :])

    around = chain(range(touched.start, whole.start), range(whole.stop, touched.stop)) if whole else touched
    for at in around:
        yield from _inside(piece, rest, *rows(at, 1), start - at * step, stop - at * step)
    if whole:
        yield rows(whole.start, len(whole))


def written_by(rank: int, side: MegatronLayout, spec: ModelSpec, mesh: Mesh, distributed: bool) -> set[tuple[str, str]]:
    """(tensor, storage) of the pieces that this rank writes, where several hold them: the lowest rank does.

    With a distributed optimizer that is the lowest of those at the same place along the data shards, each of which has
    a part of its own.
    """
    found = set()
    for piece in side.layout(rank):
        holders = {other for held, ranks in side.holders(piece.name) if held.box == piece.box for other in ranks}
        if distributed:
            axes = ("expert_data",) if _is_expert(spec, piece.name) else ("data", "context")
            place = _place(mesh, rank, axes)
            holders = {other for other in holders if _place(mesh, other, axes) == place}
        if rank == min(holders):
            found.add((piece.name, piece.storage))
    return found


def _is_expert(spec: ModelSpec, name: str) -> bool:
    _, _, inside = name.removeprefix(LAYER).partition(".")
    return bool(spec.experts) and name.startswith(LAYER) and split_expert(spec, inside) is not None


def _place(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    at = mesh.coordinates(rank, EXPERT_AXES if axes[0].startswith("expert") else AXES)
    return tuple(at[axis] for axis in axes)
