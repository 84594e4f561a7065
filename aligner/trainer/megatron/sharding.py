"""Checkpoints as one file for each rank of a Megatron layout, for tools/convert.py (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from aligner.models.spec import ModelSpec
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout


@dataclass(frozen=True)
class MegatronSharding:
    """Parallel sizes as in placement.policy, without data-parallel copies (`aligner.models.stored.Sharding`)."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def sizes(self) -> Mapping[str, int]:
        """By name."""
        return asdict(self)

    def layout(self, spec: ModelSpec, dtype: str) -> MegatronLayout:
        """What each of the folder's files holds; ValueError where the model cannot be cut so."""
        ranks = self.pipeline * max(self.tensor, self.expert * self.expert_tensor)
        return MegatronLayout(spec, Mesh(tuple(range(ranks)), **asdict(self), name="layout"), dtype)
