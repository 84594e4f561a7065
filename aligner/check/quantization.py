"""Whether a policy's ranks can quantize what a rollout keeps in FP8: rollout.quantization."""

from __future__ import annotations

from collections.abc import Mapping

from aligner.config.schema import Config
from aligner.models.spec import ModelSpec
from aligner.reshard.plan.block_scales import QuantizedSource
from aligner.rollout.quantization import SETTING, quantized_tensors
from aligner.spmd.mesh import Mesh
from aligner.trainer.engines import backend


def check_quantization(config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh]) -> None:
    """Each rank of the policy holds whole blocks, of which it alone can know the scale.

    Raises:
        ValueError: one holds a part of a block; a tensor is named, and what to set.
    """
    if "policy" not in specs or "rollout" not in specs or config.rollout.quantization == "none":
        return
    spec = specs["policy"]
    plain = backend(config.policy.engine).layout(spec, meshes["policy"], config.policy)
    QuantizedSource(plain, quantized_tensors(spec, config.rollout), SETTING, "a rank of placement.policy").check()
