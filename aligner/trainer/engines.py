"""The training backends by name: checks, layout and memory estimate without importing them, and their engines (no torch)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from aligner.models.families import FAMILIES
from aligner.models.tensors import architecture_of
from aligner.trainer.config import ENGINES, TrainingConfig
from aligner.trainer.fsdp import checks as fsdp
from aligner.trainer.megatron.activations import activation_bytes
from aligner.trainer.megatron.layout import MegatronLayout
from aligner.trainer.megatron.sizes import bytes_per_rank, check_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from aligner.models.spec import ModelSpec
    from aligner.reshard.plan.layout import WeightLayout
    from aligner.spmd.mesh import Mesh
    from aligner.trainer.activations import Activations, Microbatch
    from aligner.trainer.engine import TrainEngine


class Check(Protocol):
    """Raises ValueError, naming the setting and the values that would work, if the backend cannot run a model as configured.

    `mesh.name` is the role: its parallel sizes are the settings `placement.<role>`.
    """

    def __call__(
        self, spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool
    ) -> None: ...


class MemoryEstimate(Protocol):
    """Bytes of weights, gradients and optimizer state on one of the role's ranks; activations are not counted."""

    def __call__(self, spec: ModelSpec, mesh: Mesh, config: TrainingConfig, learns: bool) -> float: ...


class ActivationEstimate(Protocol):
    """Bytes that a rank takes, beside what the role holds, for a microbatch: the rank with the most.

    Args:
        batch: the largest microbatch of an update.
        forward_batch: that of a forward pass without gradients.
        microbatches: of an optimizer step on a data shard.
        device: cpu or cuda.
    """

    def __call__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        config: TrainingConfig,
        sequence_parallel: bool,
        batch: Microbatch,
        forward_batch: Microbatch,
        microbatches: int,
        device: str,
    ) -> Activations: ...


@dataclass(frozen=True)
class Backend:
    """One training backend: its rank arithmetic and the import path of its engine."""

    check: Check
    layout: Callable[[ModelSpec, Mesh, TrainingConfig], WeightLayout]
    """(model, mesh, settings) -> which region of which checkpoint tensor every rank of the mesh holds."""
    bytes_per_rank: MemoryEstimate
    engine: str
    """Import path of the `TrainEngine`, imported only where a model is built, since that takes seconds."""
    activations: ActivationEstimate | None = None
    """None: nobody has worked them out."""

    def engine_type(self) -> type[TrainEngine]:
        """Import the backend."""
        module, _, name = self.engine.rpartition(".")
        return cast("type[TrainEngine]", getattr(importlib.import_module(module), name))


def _check_megatron(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool) -> None:
    """Megatron runs every combination of settings; only the family or parallel sizes may not fit."""
    if spec.tensors is not None:
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        fsdp.check_trains(spec, mesh.name)  # else advice to use it would be followed by the next error
        raise ValueError(
            f"{mesh.name}.engine=megatron: architecture {architecture_of(spec)} ({spec.path}/config.json) is not supported; use "
            f"{mesh.name}.engine=fsdp, which runs transformers' own class, or a model of {supported}."
        )
    if spec.experts and config.experts == "grouped" and config.dtype != "bfloat16" and not cpu:
        raise ValueError(
            f"{mesh.name}.experts=grouped: the kernel of GPUs takes bfloat16, and {mesh.name}.dtype={config.dtype}; use "
            f"{mesh.name}.experts=sequential, or dtype=bfloat16."
        )
    check_runs(spec, mesh, sequence_parallel, cpu)


def _megatron_layout(spec: ModelSpec, mesh: Mesh, config: TrainingConfig) -> WeightLayout:
    return MegatronLayout(spec, mesh, config.dtype, config.experts == "grouped")


def _fsdp_layout(spec: ModelSpec, mesh: Mesh, config: TrainingConfig) -> WeightLayout:
    """float32 in a model that learns, whatever it computes in; nobody else asks for a layout before the model is built."""
    from aligner.trainer.fsdp.layout import FsdpLayout  # imported here: torch and transformers take seconds

    return FsdpLayout(spec, mesh)


BACKENDS: Mapping[str, Backend] = {
    "megatron": Backend(
        _check_megatron,
        _megatron_layout,
        bytes_per_rank,
        "aligner.trainer.megatron.engine.MegatronEngine",
        activation_bytes,
    ),
    "fsdp": Backend(fsdp.check_runs, _fsdp_layout, fsdp.bytes_per_rank, "aligner.trainer.fsdp.engine.FsdpEngine"),
}
"""Backends by the value of the `engine` settings."""
assert tuple(BACKENDS) == ENGINES, "aligner.trainer.config names other training backends"


def backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"engine={name} is unknown; use {', '.join(BACKENDS)}.")
    return BACKENDS[name]
