"""The training backends by name: what can be asked of one before it is imported, and how to import it (no torch)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from aligner.trainer.config import ENGINES, TrainingConfig
from aligner.trainer.megatron.layout import MegatronLayout
from aligner.trainer.megatron.sizes import bytes_per_rank, check_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from aligner.models.spec import ModelSpec
    from aligner.reshard.plan.layout import WeightLayout
    from aligner.spmd.mesh import Mesh
    from aligner.trainer.engine import TrainEngine


class Check(Protocol):
    """ValueError, with the setting and the values that would work, where the backend cannot run a model as it is configured.

    `mesh.name` is the role: its parallel sizes stand under `placement.<role>`.
    """

    def __call__(
        self, spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool
    ) -> None: ...


class MemoryEstimate(Protocol):
    """Bytes of weights, gradients and optimizer state on one of the role's ranks; activations are not counted."""

    def __call__(self, spec: ModelSpec, mesh: Mesh, config: TrainingConfig, learns: bool) -> float: ...


@dataclass(frozen=True)
class Backend:
    """One training backend, as far as rank arithmetic goes, and its engine."""

    check: Check
    layout: Callable[[ModelSpec, Mesh, str], WeightLayout]
    """(model, mesh, data type) -> which region of which checkpoint tensor every rank of the mesh holds."""
    bytes_per_rank: MemoryEstimate
    engine: str
    """Import path of the `TrainEngine`, which is imported only where a model is built: that takes seconds."""

    def engine_type(self) -> type[TrainEngine]:
        """Import the backend."""
        module, _, name = self.engine.rpartition(".")
        return cast("type[TrainEngine]", getattr(importlib.import_module(module), name))


def _check_megatron(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool) -> None:
    """Every combination of settings runs; sizes may not."""
    check_runs(spec, mesh, sequence_parallel, cpu)


BACKENDS: Mapping[str, Backend] = {
    "megatron": Backend(
        _check_megatron, MegatronLayout, bytes_per_rank, "aligner.trainer.megatron.engine.MegatronEngine"
    ),
}
"""By the value of the `engine` settings."""
assert tuple(BACKENDS) == ENGINES, "aligner.trainer.config names other training backends"


def backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in BACKENDS:
        raise ValueError(f"engine={name} is unknown; use {', '.join(BACKENDS)}.")
    return BACKENDS[name]
