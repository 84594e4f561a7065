"""Parallel mesh of a role: tensor, context, data, pipeline and expert coordinates of each world rank.

All rank arithmetic is in this file. The order of the axes is Megatron's
`tp-cp-ep-dp-pp`: tensor neighbours are adjacent ranks, pipeline stages are farthest apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

AXES = ("tensor", "context", "data", "pipeline")
EXPERT_AXES = ("expert_tensor", "expert", "expert_data", "pipeline")


@dataclass(frozen=True)
class Mesh:
    """A role's world ranks as a grid; `data` is what the other sizes leave over.

    The same ranks form a second grid for experts: `expert_tensor` x `expert` x `expert_data` x `pipeline`.

    Raises:
        ValueError: sizes that do not divide the number of ranks.
    """

    ranks: tuple[int, ...]
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    name: str = "role"
    expert_tensor: int = 0
    """Tensor-parallel size of experts; 0 stands for 1 where expert > 1, else for `tensor`."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage (of each chunk, in the model's order, with virtual_pipeline > 1); (): equal."""
    virtual_pipeline: int = 1
    """Chunks of layers that each pipeline stage has."""
    replicas: int = 1
    """Copies of fully sharded weights: each is spread over data / replicas ranks (hybrid sharding)."""

    def __post_init__(self) -> None:
        if not self.expert_tensor:
            object.__setattr__(self, "expert_tensor", 1 if self.expert > 1 else self.tensor)
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 0:
            raise ValueError(f"placement.{self.name}.ranks={list(self.ranks)} must be ascending, distinct and >= 0.")
        for axis in ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline", "replicas"):
            if getattr(self, axis) < 1:
                raise ValueError(f"placement.{self.name}.{axis}={getattr(self, axis)} must be at least 1.")
        whole = self.tensor * self.pipeline * self.context
        if self.size % whole:
            axis = max(("tensor", "pipeline", "context"), key=lambda a: getattr(self, a))
            others = whole // getattr(self, axis)
            works = [n for n in range(1, self.size + 1) if self.size % (n * others) == 0]
            advice = f"use {_any_of(works)}" if works else "lower the other sizes too"
            raise ValueError(
                f"placement.{self.name}.{axis}={getattr(self, axis)} does not divide its {self.size} rank(s) "
                f"(tensor={self.tensor} x pipeline={self.pipeline} x context={self.context}); {advice}."
            )
        if self.data % self.replicas:
            works = [n for n in range(1, self.data + 1) if self.data % n == 0]
            raise ValueError(
                f"placement.{self.name}.replicas={self.replicas} does not divide its {self.data} data-parallel rank(s); use "
                f"{_any_of(works)}."
            )
        stage = self.size // self.pipeline
        for axis, other in (("expert", self.expert_tensor), ("expert_tensor", self.expert)):
            works = [n for n in range(1, stage + 1) if stage % (n * other) == 0]
            if works and getattr(self, axis) not in works:
                raise ValueError(
                    f"placement.{self.name}.{axis}={getattr(self, axis)} does not divide the {stage} rank(s) of a "
                    f"pipeline stage (expert={self.expert} x expert_tensor={self.expert_tensor}); use {_any_of(works)}."
                )
        if stage % (self.expert * self.expert_tensor):
            raise ValueError(
                f"placement.{self.name}.expert={self.expert} x expert_tensor={self.expert_tensor} does not divide the "
                f"{stage} rank(s) of a pipeline stage; lower both."
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def data(self) -> int:
        """Number of data-parallel shards."""
        return self.size // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Number of data-parallel replicas of each expert shard."""
        return self.size // (self.expert_tensor * self.expert * self.pipeline)

    def sizes(self, axes: Sequence[str]) -> tuple[int, ...]:
        """Extents of the named axes."""
        return tuple(getattr(self, axis) for axis in axes)

    def coordinates(self, rank: int, axes: Sequence[str] = AXES) -> dict[str, int]:
        """Coordinates of a member world rank: {axis: index}. Raises ValueError for a non-member."""
        if rank not in self._index:
            raise ValueError(f"rank {rank} is none of placement.{self.name}.ranks")
        index = self._index[rank]
        coordinates = {}
        for axis, extent in zip(axes, self.sizes(axes), strict=True):
            coordinates[axis] = index % extent
            index //= extent
        return coordinates

    @cached_property
    def _index(self) -> dict[int, int]:
        return {rank: index for index, rank in enumerate(self.ranks)}

    def groups(self, *vary: str) -> tuple[tuple[int, ...], ...]:
        """Every set of ranks that differ only along the axes `vary`, each in mesh order.

        `groups("tensor")` are the tensor-parallel groups; `groups("tensor", "pipeline")` the model-parallel ones.
        Expert axes (`expert_tensor`, `expert`, `expert_data`) and dense axes cannot be mixed, except `pipeline`.
        """
        axes = EXPERT_AXES if any(axis.startswith("expert") for axis in vary) else AXES
        assert all(axis in axes for axis in vary), f"{vary} mixes dense and expert axes"
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            coordinates = self.coordinates(rank, axes)
            groups.setdefault(tuple(coordinates[a] for a in axes if a not in vary), []).append(rank)
        return tuple(tuple(group) for group in groups.values())

    @cached_property
    def shards(self) -> tuple[tuple[int, ...], ...]:
        """For each data-parallel index, the world ranks that hold its rows."""
        shards: list[list[int]] = [[] for _ in range(self.data)]
        for rank in self.ranks:
            shards[self.coordinates(rank)["data"]].append(rank)
        return tuple(tuple(shard) for shard in shards)

    @property
    def replica_ranks(self) -> tuple[tuple[int, ...], ...]:
        """For each replica of fully sharded weights its ranks, in the order of the shards that they hold; without tensor,
        context and pipeline parallelism."""
        assert self.tensor == self.context == self.pipeline == 1, "weights that are not sharded over data ranks alone"
        size = self.size // self.replicas
        return tuple(self.ranks[first : first + size] for first in range(0, self.size, size))

    def shard_of(self, rank: int) -> int | None:
        """The data-parallel shard whose rows `rank` holds; None for a non-member."""
        return self.coordinates(rank)["data"] if rank in self._index else None

    @property
    def last_stage(self) -> int:
        """Index of the last pipeline stage."""
        return self.pipeline - 1


SHOWN_AXES = ("data", "tensor", "pipeline", "context", "expert", "expert_tensor")


def axes(mesh: Mesh) -> list[str]:
    """Axes of size > 1, for display; expert axes only under expert parallelism."""
    has_experts = mesh.expert > 1
    return [
        axis
        for axis in SHOWN_AXES
        if getattr(mesh, axis) > 1 and (has_experts or axis not in EXPERT_AXES or axis == "pipeline")
    ]


def shown(ranks: Iterable[int]) -> str:
    """Ascending ranks, such as "0-3,6"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _any_of(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    return ", ".join(str(v) for v in values[:-1]) + f" or {values[-1]}"
