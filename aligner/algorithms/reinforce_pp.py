"""REINFORCE++ (Hu 2025): no critic, no groups; advantages are whitened over the global batch, KL is in the token reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aligner.algorithms.ppo import token_rewards
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whiten_batch
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.advantages import reinforce_pp_advantages
from aligner.roles.build import Roles


@dataclass(frozen=True)
class ReinforcePpConfig:
    """Settings of `reinforce_pp`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build."""
    group_size: int = 1
    """Samples per prompt; there is no group baseline."""
    gamma: float = 1.0
    """Discount factor per token."""
    kl_coef: float = 0.01
    """Coefficient of KL(policy || reference) in the token reward, in reward per nat."""
    reward_clip: float = 10.0
    """Clip the reward to [-reward_clip, reward_clip]."""
    loss: Any = None
    """Policy loss with its arguments, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"algorithm.gamma={self.gamma} must be between 0 and 1.")
        if self.group_size < 1 or not self.reward_clip > 0:
            raise ValueError(
                f"algorithm.group_size={self.group_size} must be 1 or more, "
                f"algorithm.reward_clip={self.reward_clip} more than 0."
            )


def reinforce_pp(roles: Roles, prompts: Iterable[list[Prompt]], cfg: ReinforcePpConfig) -> Iterator[Step]:
    """One policy update for each batch of prompts."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        samples, scores = batch.samples, batch.scores
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_BT = policy.map(
            token_rewards, trained, scores["reward_B"], reference_logp_BT, cfg.kl_coef, 1.0, cfg.reward_clip
        )
        advantage_BT = whiten_batch(policy, policy.map(token_advantages, reward_BT, trained, cfg.gamma), trained)
        metrics = policy.update(cfg.loss, trained, advantage_BT=advantage_BT, reference_logp_BT=reference_logp_BT)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores)


def token_advantages(reward_BT: Tensor, samples: Samples, gamma: float) -> Tensor:
    """[B, T] discounted return from each trained token on."""
    return reinforce_pp_advantages(reward_BT, samples.mask_BT, gamma=gamma)
