"""What a role holds in memory on one of its ranks: an estimate before anything is built (no torch)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from aligner.models.spec import ModelSpec
from aligner.reshard.region import ELEMENT_BYTES
from aligner.spmd.mesh import Mesh

if TYPE_CHECKING:
    from aligner.config import Config


def learns(role: str, roles: Collection[str]) -> bool:
    """Whether a job with these roles trains this one: the policy and the critic, or what there is without a policy."""
    return role in (("policy", "critic") if "policy" in roles else ("critic", "reward_model"))


def role_bytes(config: Config, role: str, roles: Collection[str], spec: ModelSpec, mesh: Mesh, cpu: bool) -> float:
    """Bytes on one of the role's ranks, the mean over pipeline stages; activations are not counted.

    A frozen model: its weights. One that learns: its weights, float32 gradients, and float32 masters with two moments
    over the data shards. The rollout: its weights and its KV cache, where that is known (not on CUDA with
    rollout.kv_cache_mib=null).
    """
    dense = (spec.parameters - spec.parameters_of_experts) / (mesh.tensor * mesh.pipeline)
    if role == "rollout":
        experts = spec.parameters_of_experts / (mesh.tensor * mesh.pipeline)  # cut, or whole ones: as many weights
        cache = config.rollout.kv_cache_bytes(spec, mesh.tensor, cpu, mesh.pipeline) or 0
        return (dense + experts) * ELEMENT_BYTES[config.rollout.dtype] + cache
    settings = config.reference.over(config.policy) if role == "reference" else getattr(config, role)
    experts = spec.parameters_of_experts / (mesh.expert_tensor * mesh.expert * mesh.pipeline)
    held = (dense + experts) * ELEMENT_BYTES[settings.dtype]
    if learns(role, roles):
        for weights, copies in ((dense, mesh.data * mesh.context), (experts, mesh.expert_data)):
            held += weights * (4 + 12 / (copies if settings.optimizer.distributed else 1))
    return held
