"""Which of a model's weights an engine keeps in FP8, and how many bytes that leaves: rollout.quantization (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from aligner.models.cuts import Columns, GroupedQKV, Parameter, Rows, tensor_shapes
from aligner.models.tensors import expert_parameters, expert_prefix, layer_name, layer_parameters, parameter_count
from aligner.reshard.plan.block_scales import scale_shapes
from aligner.reshard.plan.region import ELEMENT_BYTES

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.rollout.config import RolloutConfig

SETTING = "rollout.quantization=fp8"


def quantized_tensors(spec: ModelSpec, config: RolloutConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that the engine keeps in FP8: the projections of attention, MLPs and experts.

    Embedding, output layer, norms, biases and routers keep the engine's data type.
    """
    if config.quantization == "none":
        return {}
    of_layer = {name: _projections(layer_parameters(spec, name)) for name in spec.types}
    experts = _projections(expert_parameters(spec)) if spec.experts else {}
    tensors: dict[str, tuple[int, ...]] = {}
    for number, kind in enumerate(spec.layer_types):
        tensors |= {layer_name(number, name): shape for name, shape in of_layer[kind].items()}
        for expert in range(spec.experts if spec.types[kind].sparse else 0):
            prefix = expert_prefix(spec, expert)
            tensors |= {layer_name(number, f"{prefix}{name}"): shape for name, shape in experts.items()}
    return tensors


def weight_bytes(spec: ModelSpec, config: RolloutConfig) -> float:
    """Bytes of a whole model's weights in an engine."""
    quantized = quantized_tensors(spec, config)
    elements = sum(map(math.prod, quantized.values()))
    scales = sum(map(math.prod, scale_shapes(quantized).values()))
    return float((parameter_count(spec) - elements) * ELEMENT_BYTES[config.dtype] + elements + 4 * scales)


def _projections(parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    sharded = (parameter for parameter in parameters if isinstance(parameter.cut, Columns | GroupedQKV | Rows))
    return {name: shape for name, shape in tensor_shapes(sharded).items() if len(shape) == 2}
