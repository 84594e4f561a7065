"""What Megatron's optimizer holds on this rank, as flat ranges of parameters: float32 masters and Adam's moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """Everything that this rank's optimizer holds."""
    names = {id(parameter): name for name, parameter in model.parameters.items()}
    return [
        OptimizerSlice(names[id(parameter)], start, stop, master.data.view(-1), _moments(inner, master))
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


def optimizer_tensors(optimizer: Optimizer, others: Iterable[Tensor]) -> list[Tensor]:
    """Masters and moments as far as there are any yet, without what shares a storage with `others`: float32 parameters are
    their own masters."""
    elsewhere = {storage._cdata for storage in storages(others)}
    whole: Any = optimizer.inner
    tensors: list[Tensor] = []
    for one in getattr(whole, "chained_optimizers", [whole]):
        if one.optimizer is not None:  # a rank of an expert-parallel layout may have nothing to optimise
            tensors += [p.data for group in one.optimizer.param_groups for p in group["params"]]
            tensors += [
                value for state in one.optimizer.state.values() for value in state.values() if _is_moment(value)
            ]
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in elsewhere]


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0  # Adam's step count is a scalar on the host


def saved_pieces(
    rank: int, layout: MegatronLayout, spec: ModelSpec, mesh: Mesh, distributed: bool
) -> frozenset[tuple[str, str]]:
    """(tensor, storage) of the pieces that this rank writes to checkpoints; of several that hold one the lowest does.

    With a distributed optimizer that is the lowest of those at the same place along the data shards, each of which has
    a part of its own.
    """
    saved = set()
    for piece in layout.layout(rank):
        holders = {other for held, ranks in layout.holders(piece.name) if held.box == piece.box for other in ranks}
        if distributed:
            axes = ("expert_data",) if _is_expert(spec, piece.name) else ("data", "context")
            place = _place(mesh, rank, axes)
            holders = {other for other in holders if _place(mesh, other, axes) == place}
        if rank == min(holders):
            saved.add((piece.name, piece.storage))
    return frozenset(saved)


def _is_expert(spec: ModelSpec, name: str) -> bool:
    _, _, inside = name.removeprefix(LAYER).partition(".")
    return bool(spec.experts) and name.startswith(LAYER) and split_expert(spec, inside) is not None


def _place(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    at = mesh.coordinates(rank, EXPERT_AXES if axes[0].startswith("expert") else AXES)
    return tuple(at[axis] for axis in axes)
