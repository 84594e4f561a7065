"""REINFORCE++ (Hu 2025): no critic, no groups; advantages are whitened over the global batch, KL is in the token reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from aligner.algorithms.ppo import token_rewards
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whiten_batch
from aligner.bounds import AtLeast, Between, MoreThan
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.advantages import reinforce_pp_advantages
from aligner.roles.build import Roles


@dataclass(frozen=True)
class ReinforcePpConfig:
    """Settings of `reinforce_pp`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build."""
    group_size: Annotated[int, AtLeast(1)] = 1
    """Samples per prompt; there is no group baseline."""
    gamma: Annotated[float, Between(0, 1)] = 1.0
    """Discount factor per token."""
    kl_coef: float = 0.01
    """Coefficient of KL(policy || reference) in the token reward, in reward per nat."""
    reward_clip: Annotated[float, MoreThan(0)] = 10.0
    """Clip the reward to [-reward_clip, reward_clip]."""
    loss: Any = None
    """Policy loss with its arguments, as a `_target_` with `_partial_: true`."""


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
