"""Whether a rollout can generate with the policy's own weights: rollout.share_policy_weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from aligner.config.schema import Config
from aligner.spmd.mesh import Mesh


def check_shared_weights(config: Config, roles: Collection[str], meshes: Mapping[str, Mesh]) -> None:
    """Raises ValueError, naming the setting and what would work, where weights cannot be shared as configured."""
    for role in (config.role(name) for name in config.models if name in roles):
        if getattr(config.settings(role.name), "share_policy_weights", False):
            raise ValueError(
                f"{role.section}.share_policy_weights=true: only the rollout computes with the policy's weights; leave it out."
            )
    if "rollout" not in roles or not config.rollout.share_policy_weights:
        return
    policy, rollout, stream = meshes["policy"], meshes["rollout"], config.stream
    outside = sorted({*rollout.ranks} - {*policy.ranks})
    shards = policy.size // policy.replicas
    problem = None
    if config.policy.engine != "fsdp":
        problem = f"policy.engine={config.policy.engine} holds them in other tensors than transformers' model; use policy.engine=fsdp"
    elif outside:
        problem = f"rank {outside[0]} of the rollout is none of the policy's; use placement.rollout.ranks=policy"
    elif shards > 1:
        problem = (
            f"each rank holds one of {shards} parts of the policy; use one rank, or one rank per replica: "
            f"placement.policy.replicas={policy.size}"
        )
    elif config.rollout.dtype != "float32":
        problem = f"they are float32, and rollout.dtype={config.rollout.dtype}; use rollout.dtype=float32"
    elif stream.lag:
        problem = f"stream.lag={stream.lag} generates with weights from before an update; use stream.lag=0"
    if problem:
        raise ValueError(f"rollout.share_policy_weights=true: {problem}, or share_policy_weights=false.")
