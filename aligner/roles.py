"""The roles of a job, built from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.policy.policy import Policy, Reference
from aligner.reward.role import Reward
from aligner.rollout.role import Rollout
from aligner.spmd.placement import reference_layout
from aligner.spmd.world import World

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from aligner.config import Config
    from aligner.models.spec import ModelSpec
    from aligner.spmd.mesh import Mesh

ROLES = ("policy", "rollout", "reference", "reward")


@dataclass(frozen=True)
class Roles:
    """What a loop calls. A role that algorithm.roles does not name is absent: None where a loop may do without it."""

    policy: Policy
    rollout: Rollout
    reward: Reward
    reference: Reference | None = None


def build_roles(
    config: Config,
    wanted: list[str],
    world: World,
    meshes: Mapping[str, Mesh],
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> Roles:
    """Every rank calls this; each role builds its engine on its own ranks only."""
    temperature = config.sampling.temperature if "rollout" in wanted else 1.0
    placement = config.placement
    policy = Policy(
        "policy",
        world,
        meshes["policy"],
        spec,
        config.policy,
        sequence_parallel=placement.policy.sequence_parallel,
        temperature=temperature,
        total_steps=config.train.steps * config.policy.minibatches * config.policy.epochs,
        max_response=config.sampling.max_tokens,
    )
    reference = None
    if "reference" in wanted:
        reference = Reference(
            "reference",
            world,
            meshes["reference"],
            spec,
            config.policy,
            sequence_parallel=reference_layout(placement).sequence_parallel,
            temperature=temperature,
        )
    rollout = reward = None
    if "rollout" in wanted:
        rollout = Rollout("rollout", world, meshes["rollout"], spec, config.rollout, config.sampling, config.seed)
    if "reward" in wanted:
        reward = Reward("reward", world, meshes["reward"], config.reward, tokenizer)
    return Roles(policy, rollout, reward, reference)  # type: ignore[arg-type]
