"""Which ranks each role has and how it is parallelised there; checked before any process group is made."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from aligner.spmd.mesh import Mesh
from aligner.spmd.role_table import USUAL, RoleSpec

RANKS_THAT_WORK = 'a list such as [0,1], ranges like "0-3,6", or parts like 0%-50%'
PART = re.compile(r"\s*(?:(\d+)(?:-(\d+))?|(\d+(?:\.\d+)?)%-(\d+(?:\.\d+)?)%)\s*")
"""A rank, ranks first-last, or a part of the world: those from one boundary up to, and not with, the next."""


@dataclass(frozen=True)
class RoleLayout:
    """One role's ranks and parallel sizes."""

    ranks: Any = "all"
    """World ranks: `all`, a list such as [0, 1], ranges such as "0-3,6", or parts of any world such as 0%-50%. Models:
    `policy`, further engines: `rollout`, for the ranks and sizes of that role."""
    tensor: int = 1
    """Tensor-parallel size, in ranks."""
    pipeline: int = 1
    """Pipeline-parallel size, in stages."""
    context: int = 1
    """Context-parallel size: ranks that each row's tokens are cut over (models on Megatron only)."""
    expert: int = 1
    """Expert-parallel size, in ranks. Models on Megatron: each holds experts / expert of a sparse layer's experts.
    Rollout: 1, or equal to tensor."""
    expert_tensor: int | None = None
    """Ranks that each expert is cut over (models on Megatron only); null: 1 with expert > 1, else tensor."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage, such as [3,5]; with virtual_pipeline > 1 those of each chunk in the model's
    order. []: equal stages (models on Megatron only)."""
    virtual_pipeline: int = 1
    """Chunks of layers that each pipeline stage has, which keep it busier (models on Megatron only)."""
    replicas: int = 1
    """Copies of the weights, each fully sharded over as many ranks as the others (hybrid sharding; models on FSDP only)."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel ranks along the sequence (needs tensor > 1)."""


Placement = Mapping[str, RoleLayout]
"""Role -> layout, for every role of the configuration."""


def default_layout(role: RoleSpec) -> RoleLayout:
    """Where a role is unless its placement says otherwise: all but the policy, the rollout and the reward share the
    ranks and sizes of one of these."""
    shares = role.kind.layout_of
    return RoleLayout() if shares is None or shares == role.name else RoleLayout(ranks=shares)


def usual_placement(**layouts: RoleLayout) -> dict[str, RoleLayout]:
    """The layouts of the usual roles, and of those given by name."""
    return {name: default_layout(role) for name, role in USUAL.items()} | layouts


def parse_ranks(value: Any, world_size: int, role: str) -> tuple[int, ...]:
    """`all`, a list of ints, "0-3,6" or "0%-50%" -> ascending world ranks.

    Raises:
        ValueError: not understood, repeated, or outside the world.
    """
    name = f"placement.{role}.ranks"
    if value == "all":
        return tuple(range(world_size))
    if isinstance(value, int):
        value = [value]
    if isinstance(value, str):
        value = [rank for part in value.split(",") for rank in _part(part, value, world_size, name)]
    ranks = [int(rank) for rank in value]
    if not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"{name}={ranks} must name at least one rank and none twice.")
    outside = [rank for rank in ranks if not 0 <= rank < world_size]
    if min(ranks) < 0:
        raise ValueError(
            f"{name}={sorted(ranks)}: ranks count from 0, and a negative one names none; use 0 to {world_size - 1}."
        )
    if outside:
        raise ValueError(
            f"{name}={sorted(ranks)} names rank(s) {outside}, but the job has {world_size} rank(s): use 0 to "
            f"{world_size - 1}, or start it with torchrun --nproc-per-node {max(outside) + 1}."
        )
    return tuple(sorted(ranks))


def _part(text: str, whole: str, world_size: int, name: str) -> range:
    """The ranks of one part of a `ranks` setting."""
    match = PART.fullmatch(text)
    if not match:
        raise ValueError(f"{name}={whole!r} is not understood; use all, {RANKS_THAT_WORK}.")
    first, last, low, high = match.groups()
    if first is not None:
        return range(int(first), int(last or first) + 1)
    if not Fraction(low) < Fraction(high) <= 100:
        raise ValueError(f"{name}={whole!r} must go up, and to 100% at most; use parts like 0%-50% and 50%-100%.")

    def of(size: int) -> range:  # parts that share a boundary neither overlap nor leave a rank between them
        return range(*(math.floor(size * Fraction(percent) / 100) for percent in (low, high)))

    if not of(world_size):
        least = next(size for size in itertools.count(world_size + 1) if of(size))
        raise ValueError(
            f"{name}={whole} is no rank of a job of {world_size}; start it with torchrun --nproc-per-node {least} or "
            "more, or use placement=colocated."
        )
    return of(world_size)


def make_meshes(placement: Placement, world_size: int, roles: Mapping[str, RoleSpec] = USUAL) -> dict[str, Mesh]:
    """Role -> mesh for every one of `roles`; a role that shares another's layout has a mesh of its own name.

    Raises:
        ValueError: naming the setting and the values that would work.
    """
    meshes = {}
    for name, role in roles.items():
        layout = role_layout(placement, role)
        meshes[name] = _mesh(name, parse_ranks(layout.ranks, world_size, name), layout)
        _check_trained_only(role, layout)
        if role.kind.runs_on == "host" and layout.tensor != 1:
            raise ValueError(f"placement.{name}.tensor={layout.tensor}: rules run on host CPUs; use 1.")
        if layout.sequence_parallel and (layout.tensor == 1 or not role.kind.on_trainer):
            able = ", ".join(other.name for other in roles.values() if other.kind.on_trainer)
            raise ValueError(
                f"placement.{name}.sequence_parallel=true needs a model on the training backend ({able}) with "
                f"tensor > 1 (now tensor={layout.tensor}); set it to false or raise placement.{name}.tensor."
            )
    return meshes


def _mesh(role: str, ranks: tuple[int, ...], layout: RoleLayout) -> Mesh:
    if layout.expert_tensor is not None and layout.expert_tensor < 1:
        raise ValueError(f"placement.{role}.expert_tensor={layout.expert_tensor} must be at least 1.")
    return Mesh(
        ranks,
        layout.tensor,
        layout.pipeline,
        layout.context,
        layout.expert,
        role,
        layout.expert_tensor or 0,
        tuple(layout.stage_layers),
        layout.virtual_pipeline,
        layout.replicas,
    )


def _check_trained_only(role: RoleSpec, layout: RoleLayout) -> None:
    """What only models on the training backend have is refused elsewhere, never ignored."""
    if role.kind.on_trainer:
        return
    name, engine, plain = role.name, role.kind.runs_on == "engine", RoleLayout()
    for axis in (
        "context",
        "expert_tensor",
        "stage_layers",
        "virtual_pipeline",
        "replicas",
        *(() if engine else ("pipeline",)),
    ):
        works = getattr(plain, axis)
        if getattr(layout, axis) != works:
            shown = "null" if works is None else list(works) if isinstance(works, tuple) else works
            raise ValueError(
                f"placement.{name}.{axis}={getattr(layout, axis)} is not supported for {name}; use {shown}."
            )
    allowed = (1, layout.tensor) if engine else (1,)
    if layout.expert not in allowed:
        raise ValueError(
            f"placement.{name}.expert={layout.expert} is not supported for {name}; use 1"
            + (f", or {layout.tensor} (placement.{name}.tensor)." if layout.tensor > 1 and engine else ".")
        )


def role_layout(placement: Placement, role: RoleSpec) -> RoleLayout:
    """The role's own layout, or that of the role whose name stands in its `ranks` (see `RoleKind.layout_of`).

    Raises:
        ValueError: sizes without ranks, which would be silently ignored.
    """
    layout, shares = placement.get(role.name) or default_layout(role), role.kind.layout_of
    if shares is None or shares == role.name or layout.ranks != shares:
        return layout
    if layout != RoleLayout(ranks=shares):
        raise ValueError(
            f"placement.{role.name}.ranks={shares} takes the {shares}'s sizes too; to give the {role.name} sizes of its "
            f"own, give it ranks as well, such as placement.{role.name}.ranks=all."
        )
    return placement[shares]
