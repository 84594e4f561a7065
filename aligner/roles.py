"""The roles of a job, built from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from aligner.policy.policy import Policy, Reference
from aligner.reward.role import Reward
from aligner.rollout.role import Rollout
from aligner.spmd.placement import reference_layout
from aligner.spmd.role import Role
from aligner.spmd.world import World

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from aligner.config import Config
    from aligner.models.spec import ModelSpec
    from aligner.spmd.mesh import Mesh

R = TypeVar("R")


class Roles:
    """What a loop calls: `policy`, `rollout`, `reward`, and `reference`, which is None where algorithm.roles leaves it out."""

    def __init__(
        self, policy: Policy, rollout: Rollout | None, reward: Reward | None, reference: Reference | None
    ) -> None:
        self.policy, self.reference = policy, reference
        self._rollout, self._reward = rollout, reward

    @property
    def rollout(self) -> Rollout:
        """The vLLM replicas. Raises ValueError where algorithm.roles leaves them out."""
        return _present(self._rollout, "rollout")

    @property
    def reward(self) -> Reward:
        """The scorer. Raises ValueError where algorithm.roles leaves it out."""
        return _present(self._reward, "reward")

    @property
    def built(self) -> list[Role]:
        """Every role that there is."""
        return [role for role in (self.policy, self._rollout, self._reward, self.reference) if role is not None]


def _present(role: R | None, name: str) -> R:
    if role is None:
        raise ValueError(
            f"the loop uses roles.{name}, which algorithm.roles leaves out; add {name} to algorithm.roles."
        )
    return role


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
        reshard=config.reshard,
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
    return Roles(policy, rollout, reward, reference)
