"""REINFORCE++ (Hu 2025): no critic and no groups; the baseline is the whole batch, KL is paid token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from aligner.algorithms.ppo import token_rewards
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whitened
from aligner.bounds import AtLeast, Between, MoreThan
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.advantages import reinforce_pp_advantages
from aligner.roles.build import Roles


@dataclass(frozen=True)
class ReinforcePpConfig:
    """REINFORCE++."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build."""
    group_size: Annotated[int, AtLeast(1)] = 1
    """Samples per prompt; they are not compared with each other."""
    gamma: Annotated[float, Between(0, 1)] = 1.0
    """Discount a token."""
    kl_coef: float = 0.01
    """What a nat of KL(policy || reference) costs in a token's reward."""
    reward_clip: Annotated[float, MoreThan(0)] = 10.0
    """Bound on the reward."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""


def reinforce_pp(roles: Roles, prompts: Iterable[list[Prompt]], cfg: ReinforcePpConfig) -> Iterator[Step]:
    """One update for each batch of prompts."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        samples, scores = batch.samples, batch.scores
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_BT = policy.map(
            token_rewards, trained, scores["reward_B"], reference_logp_BT, cfg.kl_coef, 1.0, cfg.reward_clip
        )
        advantage_BT = whitened(policy, policy.map(to_go, reward_BT, trained, cfg.gamma), trained)
        metrics = policy.update(cfg.loss, trained, advantage_BT=advantage_BT, reference_logp_BT=reference_logp_BT)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores)


def to_go(reward_BT: Tensor, samples: Samples, gamma: float) -> Tensor:
    """What each token still earns."""
    return reinforce_pp_advantages(reward_BT, samples.mask_BT, gamma=gamma)
