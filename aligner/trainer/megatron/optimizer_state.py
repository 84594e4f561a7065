"""Megatron's optimizer state on this rank, as flat ranges of parameters: float32 masters and Adam's moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aligner.models.tensors import LAYER, split_expert
from aligner.spmd.mesh import AXES, EXPERT_AXES, Mesh
from aligner.trainer.engine import MOMENTS, OptimizerSlice
from aligner.trainer.offload import storages

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.trainer.megatron.layout import MegatronLayout
    from aligner.trainer.megatron.model import ShardedModel
    from aligner.trainer.megatron.optimizer import Optimizer


def slices(optimizer: Optimizer, model: ShardedModel) -> list[OptimizerSlice]:
    """This rank's optimizer state."""
    names = {id(parameter): name for name, parameter in model.parameters.items()}
    return [
        OptimizerSlice(names[id(parameter)], start, stop, master.data.view(-1), _moments(inner, master))
        for inner, parameter, start, stop, master in _masters(optimizer)
    ]


def _masters(optimizer: Optimizer) -> Iterator[tuple[Any, Any, int, int, Any]]:
    """(torch optimizer, Megatron parameter, start, stop of the range in it, float32 master), for each optimizer in the chain."""
    for chained in _chain(optimizer):
        inner = chained.optimizer
        if inner is None:  # under expert parallelism a rank may have no parameters of a kind
            continue
        if hasattr(
            chained, "model_param_gbuf_map"
        ):  # distributed: each data-parallel rank has a part of each flat buffer
            for parameter in chained.model_param_gbuf_map:
                group, index = chained.model_param_group_index_map[parameter]
                local_range = chained._get_model_param_range_map(parameter)["param"]
                yield inner, parameter, local_range.start, local_range.end, inner.param_groups[group]["params"][index]
        elif hasattr(chained, "float16_groups"):
            groups = zip(chained.float16_groups, chained.fp32_from_float16_groups, strict=True)
            pairs = [pair for halves, masters in groups for pair in zip(halves, masters, strict=True)]
            pairs += [(p, p) for group in chained.fp32_from_fp32_groups for p in group]
            for parameter, master in pairs:
                yield inner, parameter, 0, parameter.numel(), master
        else:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                yield inner, parameter, 0, parameter.numel(), parameter


def _chain(optimizer: Optimizer) -> Sequence[Any]:
    """Megatron's optimizers: one for each kind of parameters (dense, experts), in a chain if there are several."""
    megatron: Any = optimizer.inner
    return getattr(megatron, "chained_optimizers", [megatron])  # type: ignore[no-any-return]


def _moments(inner: Any, master: Any) -> dict[str, Tensor]:
    state = inner.state.get(master, {})
    return {name: state[name].view(-1) for name in MOMENTS if name in state}


def make_moments(optimizer: Optimizer, steps: int) -> None:
    """Set Adam's step count to `steps` and its moments to zero, ready for a checkpoint's to be written into.

    torch's Adam has a step tensor for each parameter; fused ones (apex, TransformerEngine) a number for each group.
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


def optimizer_tensors(optimizer: Optimizer, others: Iterable[Tensor]) -> list[Tensor]:
    """Masters and moments, as far as they exist, except those that share a storage with `others` (float32 parameters are their
    own masters)."""
    excluded = {storage._cdata for storage in storages(others)}
    tensors: list[Tensor] = []
    for chained in _chain(optimizer):
        if chained.optimizer is not None:  # see `_masters`
            tensors += [p.data for group in chained.optimizer.param_groups for p in group["params"]]
            tensors += [
                value for state in chained.optimizer.state.values() for value in state.values() if _is_moment(value)
            ]
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in excluded]


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0  # Adam's step count is a scalar on the host


def saved_pieces(
    rank: int, layout: MegatronLayout, spec: ModelSpec, mesh: Mesh, distributed: bool
) -> frozenset[tuple[str, str]]:
    """(tensor, storage) of the pieces that this rank writes to checkpoints: the lowest rank that holds a piece writes it.

    With a distributed optimizer, the lowest with the same data-parallel coordinates, each of which holds its own part.
    """
    saved = set()
    for piece in layout.layout(rank):
        holders = {other for held, ranks in layout.holders(piece.name) if held.box == piece.box for other in ranks}
        if distributed:
            axes = ("expert_data",) if _is_expert(spec, piece.name) else ("data", "context")
            coordinates = _coordinates(mesh, rank, axes)
            holders = {other for other in holders if _coordinates(mesh, other, axes) == coordinates}
        if rank == min(holders):
            saved.add((piece.name, piece.storage))
    return frozenset(saved)


def _is_expert(spec: ModelSpec, name: str) -> bool:
    _, _, suffix = name.removeprefix(LAYER).partition(".")
    return bool(spec.experts) and name.startswith(LAYER) and split_expert(spec, suffix) is not None


def _coordinates(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    coordinates = mesh.coordinates(rank, EXPERT_AXES if axes[0].startswith("expert") else AXES)
    return tuple(coordinates[axis] for axis in axes)
