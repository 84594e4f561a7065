"""How a model can be split: valid parallel sizes, and the layers of each pipeline stage (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from aligner.models.spec import ModelSpec
from aligner.models.tensors import parameter_count
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.spmd.mesh import Mesh

if TYPE_CHECKING:
    from aligner.trainer.config import TrainingConfig


@dataclass(frozen=True)
class Stages:
    """Layers of pipeline stages, in chunks: chunk c of stage s is block c x stages + s of the model."""

    blocks: tuple[range, ...]
    pipeline: int

    def chunks(self, stage: int) -> tuple[range, ...]:
        """The layers (numbered over the whole model) of each chunk of a stage."""
        return self.blocks[stage :: self.pipeline]

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether this chunk is the model's first and has the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether this chunk is the model's last and has the final norm and the output layer."""
        return chunk * self.pipeline + stage == len(self.blocks) - 1


def make_stages(spec: ModelSpec, mesh: Mesh) -> Stages:
    """Equal stages, or those of `mesh.stage_layers`.

    Raises:
        ValueError: the layers do not divide; the message names the setting and the values that would work.
    """
    section, blocks = f"placement.{mesh.name}", mesh.pipeline * mesh.virtual_pipeline
    if mesh.virtual_pipeline > 1 and mesh.pipeline == 1:
        raise ValueError(f"{section}.virtual_pipeline={mesh.virtual_pipeline} needs {section}.pipeline > 1; use 1.")
    if spec.layers < blocks:
        raise ValueError(
            f"{section}.pipeline={mesh.pipeline} does not divide the {spec.layers} layers of {spec.path} (virtual_pipeline="
            f"{mesh.virtual_pipeline} makes more chunks than there are layers); use "
            f"{_either(_divisors(spec.layers))} with virtual_pipeline=1."
        )
    counts = mesh.stage_layers
    if counts and (len(counts) != blocks or sum(counts) != spec.layers or min(counts) < 1):
        raise ValueError(
            f"{section}.stage_layers={list(counts)} must be {blocks} positive number(s) (pipeline={mesh.pipeline} x "
            f"virtual_pipeline={mesh.virtual_pipeline}) that add up to the {spec.layers} layers of {spec.path}, "
            f"such as {_even(spec.layers, blocks)}."
        )
    if not counts and spec.layers % blocks:
        chunks = mesh.virtual_pipeline
        valid_sizes = [size for size in _divisors(spec.layers) if spec.layers % (size * chunks) == 0]
        advice = f"use {_either(valid_sizes)}, or " if valid_sizes else "lower virtual_pipeline, or "
        raise ValueError(
            f"{section}.pipeline={mesh.pipeline} does not divide the {spec.layers} layers of {spec.path} (in "
            f"virtual_pipeline={chunks} chunks); {advice}say {section}.stage_layers={_even(spec.layers, blocks)}."
        )
    ends = list(accumulate(counts or [spec.layers // blocks] * blocks))
    return Stages(tuple(range(*bounds) for bounds in zip([0, *ends], ends, strict=False)), mesh.pipeline)


def valid_tensor_sizes(spec: ModelSpec) -> list[int]:
    """Tensor-parallel sizes that this model can be split by.

    They divide the heads and the width of dense MLPs; with more ranks than key/value heads, several ranks share one.
    """
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return [
        size
        for size in _divisors(spec.heads)
        if (spec.kv_heads % size == 0 or size % spec.kv_heads == 0)
        and rows % size == 0
        and (spec.ffn % size == 0 or len(spec.sparse_layers) == spec.layers)
    ]


def check_sizes(spec: ModelSpec, mesh: Mesh) -> None:
    """Raises ValueError, naming the setting and the values that would work, if the model cannot be split over this mesh."""
    section = f"placement.{mesh.name}"
    if mesh.replicas != 1:
        raise ValueError(
            f"{section}.replicas={mesh.replicas} is hybrid sharding, which engine=megatron does not have; use 1."
        )
    if mesh.tensor not in valid_tensor_sizes(spec):
        raise ValueError(
            f"{section}.tensor={mesh.tensor} does not divide the {spec.heads} heads, {spec.kv_heads} key/value heads and "
            f"MLP width {spec.ffn} of {spec.path}; use {_either(valid_tensor_sizes(spec))}."
        )
    make_stages(spec, mesh)
    if not spec.experts:
        if mesh.expert > 1 or mesh.expert_tensor not in (1, mesh.tensor):
            raise ValueError(
                f"{section}.expert={mesh.expert}, expert_tensor={mesh.expert_tensor}: {spec.path} has no experts; leave both out."
            )
        return
    if spec.experts % mesh.expert:
        valid_sizes = [size for size in _divisors(spec.experts) if size <= mesh.size]
        raise ValueError(
            f"{section}.expert={mesh.expert} does not divide the {spec.experts} experts of {spec.path}; use {_either(valid_sizes)}."
        )
    if spec.expert_ffn % mesh.expert_tensor:
        valid_sizes = [size for size in _divisors(spec.expert_ffn) if size <= mesh.size]
        raise ValueError(
            f"{section}.expert_tensor={mesh.expert_tensor} does not divide the width {spec.expert_ffn} of the experts of "
            f"{spec.path}; use {_either(valid_sizes)}."
        )


def check_runs(spec: ModelSpec, mesh: Mesh, sequence_parallel: bool, cpu: bool) -> None:
    """Raises ValueError if Megatron cannot run the model over this mesh, or would silently train it wrongly."""
    check_sizes(spec, mesh)
    if not spec.experts:
        return
    section = f"placement.{mesh.name}"
    if mesh.tensor > 1 and not sequence_parallel:
        raise ValueError(
            f"{section}.sequence_parallel=false: {spec.path} has experts, which over tensor={mesh.tensor} ranks need it; "
            "set it to true."
        )
    if mesh.expert == 1 and mesh.expert_tensor != mesh.tensor:
        raise ValueError(
            f"{section}.expert_tensor={mesh.expert_tensor} with expert=1 is not supported: gradients of the experts would "
            f"not be summed over the {mesh.tensor} tensor ranks; use {mesh.tensor}, or expert > 1."
        )
    if cpu and mesh.expert > 1 and mesh.expert_tensor > 1:
        raise ValueError(
            f"{section}.expert={mesh.expert} with expert_tensor={mesh.expert_tensor} needs collectives of unequal parts that "
            "CPUs (gloo) do not have; use expert_tensor=1, or expert=1."
        )
    if spec.norm_topk and spec.experts_per_token == 1:
        raise ValueError(
            f"{spec.path} has num_experts_per_tok=1 with normalised probabilities: its router would never "
            "learn, and Megatron refuses it; use a model with more experts per token."
        )


def bytes_per_rank(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, learns: bool) -> float:
    """Bytes on one rank, averaged over pipeline stages: weights, and with `learns` float32 gradients, two moments and, of other
    weights than float32, masters (these divided by the data-parallel size with a distributed optimizer). Activations are not
    counted."""
    dense = (parameter_count(spec) - spec.parameters_of_experts) / (mesh.tensor * mesh.pipeline)
    experts = spec.parameters_of_experts / (mesh.expert_tensor * mesh.expert * mesh.pipeline)
    total = (dense + experts) * ELEMENT_BYTES[config.dtype]
    if learns:
        for weights, data_parallel in ((dense, mesh.data * mesh.context), (experts, mesh.expert_data)):
            state = 8 if config.dtype == "float32" else 12
            total += weights * (4 + state / (data_parallel if config.optimizer.distributed else 1))
    return total


def _even(layers: int, blocks: int) -> list[int]:
    """`layers` in `blocks` parts that differ by at most one."""
    return [layers // blocks + (block >= blocks - layers % blocks) for block in range(blocks)]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _either(sizes: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))
