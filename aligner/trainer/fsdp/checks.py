"""What a role on FSDP can run, and what it holds in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner.models.spec import ModelSpec
from aligner.models.tensors import parameter_count
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.spmd.mesh import Mesh

if TYPE_CHECKING:
    from aligner.trainer.config import TrainingConfig

_ONLY_MEGATRON = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline")


def check_runs(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool) -> None:
    """Raises ValueError, naming the setting and what would work, for parallel sizes that FSDP does not have, and for a model that
    transformers does not know or computes in ways that packed rows do not allow."""
    for axis in _ONLY_MEGATRON:
        if getattr(mesh, axis) != 1:
            megatron = ", or engine=megatron" if spec.tensors is None else ""  # which runs the families of its table
            raise ValueError(
                f"placement.{mesh.name}.{axis}={getattr(mesh, axis)}: engine=fsdp shards weights over all of a role's ranks, and "
                f"has no {axis.replace('_', ' ')} parallelism; use 1{megatron}."
            )
    if mesh.stage_layers:
        raise ValueError(f"placement.{mesh.name}.stage_layers: engine=fsdp has no pipeline stages; leave it out.")
    if config.recompute == "mlp":
        raise ValueError(
            f"{mesh.name}.recompute=mlp: engine=fsdp recomputes whole layers or attention; use full or selective."
        )
    check_trains(spec, mesh.name)
    if config.dtype == "bfloat16" and spec.tensors is not None:
        _check_bfloat16(spec, mesh.name)


def _check_bfloat16(spec: ModelSpec, role: str) -> None:
    """Raises ValueError for a class that wants parameters in float32 there, as ERNIE 4.5 does its router: FSDP gathers all in bfloat16."""
    import torch

    from aligner.models.transformers_model import empty_model, kept_in_float32

    model = empty_model(spec.path, spec.head, trust_remote_code=spec.trust_remote_code)
    kept = sorted(kept_in_float32(model, torch.bfloat16).intersection(dict(model.named_parameters())))
    if kept:
        raise ValueError(
            f"{role}.dtype=bfloat16: transformers' {type(model).__name__} ({spec.path}) keeps {kept[0]} in float32, which engine=fsdp "
            "gathers in bfloat16; use float32."
        )


def check_trains(spec: ModelSpec, role: str) -> None:
    """Raises ValueError, naming the setting and what would work, where FSDP cannot train the model."""
    from aligner.trainer.fsdp.model import check_model  # imported here: torch and transformers take seconds

    try:
        check_model(spec)
    except ValueError as error:
        works = (
            f"use {role}.engine=megatron"
            if spec.tensors is None
            else f"nor does {role}.engine=megatron. Train another model; a model that only generates is models.NAME={{kind: engine, path: ...}}"
        )
        raise ValueError(f"{role}.engine=fsdp: {str(error).rstrip('.')}; {works}.") from error


def bytes_per_rank(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, learns: bool) -> float:
    """Bytes on one rank: its shard of the weights, and with `learns` of float32 masters (which are the weights), gradients and two
    moments. Gathered layers and activations are not counted."""
    shards = mesh.size // mesh.replicas
    return parameter_count(spec) / shards * (16 if learns else ELEMENT_BYTES[config.dtype])
