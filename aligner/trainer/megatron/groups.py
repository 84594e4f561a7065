"""A role's mesh as Megatron's process groups, passed explicitly; `parallel_state` stays uninitialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World


def make_groups(world: World, mesh: Mesh) -> ProcessGroupCollection | None:
    """All process groups that Megatron uses. Collective over the world: ranks outside the mesh call it too.

    Returns:
        The collection on the mesh's ranks, None elsewhere.
    """
    pipelines = mesh.groups("pipeline")
    first_and_last = [tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in pipelines]
    lists: dict[str, Any] = {
        "tp": mesh.groups("tensor"),
        "pp": pipelines,
        "mp": mesh.groups("tensor", "pipeline"),
        "cp": mesh.groups("context"),
        "tp_cp": mesh.groups("tensor", "context"),
        "dp": mesh.groups("data"),
        "dp_cp": mesh.groups("context", "data"),
        "tp_dp_cp": mesh.groups("tensor", "context", "data"),
        "ep": mesh.groups("expert"),
        "expt_tp": mesh.groups("expert_tensor"),
        "tp_ep": mesh.groups("expert_tensor", "expert"),
        "tp_ep_pp": mesh.groups("expert_tensor", "expert", "pipeline"),
        "expt_dp": mesh.groups("expert_data"),
        "embd": first_and_last,
        "pos_embd": [ranks[:1] for ranks in pipelines],
        # without it, Megatron reduces the gradient norm over the world
        "intra_dist_opt": [mesh.ranks],
    }
    groups = {name: world.my_group(rank_lists) for name, rank_lists in lists.items()}
    if world.rank not in mesh.ranks:
        return None
    return ProcessGroupCollection(
        **groups, intra_dp_cp=groups["dp_cp"], intra_expt_dp=groups["expt_dp"], inter_dist_opt=None, hcp=None
    )


def prepare_megatron() -> None:
    """Set the one global of Megatron's that is no process group: a buffer that tensor-parallel layers gather into."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


@contextmanager
def optimizer_world(group: dist.ProcessGroup) -> Iterator[None]:
    """Context in which Megatron's optimizer constructor gathers objects over the role's ranks instead of the world."""
    gather, size = dist.all_gather_object, dist.get_world_size

    def gather_in_role(objects: list[Any], obj: Any, group: Any = group) -> None:
        gather(objects, obj, group=group)

    def size_of_role(group: Any = group) -> int:
        return size(group)

    dist.all_gather_object, dist.get_world_size = gather_in_role, size_of_role  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, size
