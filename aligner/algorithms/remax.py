"""ReMax (Li et al. 2023): REINFORCE with the reward of the prompt's greedy response as the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from aligner.algorithms.grpo import shape_rewards
from aligner.algorithms.step import Step
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.data.samples import leave_out_unscored
from aligner.objective.advantages import greedy_baseline_advantages
from aligner.roles.build import Roles


@dataclass(frozen=True)
class RemaxConfig:
    """Settings of `remax`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build."""
    group_size: Annotated[int, AtLeast(1)] = 1
    """Samples per prompt, in addition to the greedy response."""
    reward_kl_coef: float = 0.0
    """Coefficient of KL(policy || reference) in the reward, in reward per nat."""
    loss: Any = None
    """Policy loss with its arguments, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.reward_kl_coef and "reference" not in self.roles:
            raise ValueError(
                f"algorithm.reward_kl_coef={self.reward_kl_coef} needs the reference; add it to algorithm.roles, or use 0."
            )


def remax(roles: Roles, prompts: Iterable[list[Prompt]], cfg: RemaxConfig) -> Iterator[Step]:
    """One policy update for each batch of prompts."""
    policy, rollout, reference, reward = roles.policy, roles.rollout, roles.reference, roles.reward
    greedy = replace(rollout.sampling, temperature=0.0)
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.sample(batch, num_samples=cfg.group_size)
        scores = reward.score(samples)
        greedy_P = reward.score(rollout.sample(batch, sampling=greedy))["reward_B"].gather()
        baseline_B = policy.scatter_like(samples, greedy_P.repeat_interleave(cfg.group_size))
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_B = policy.map(shape_rewards, samples, scores["reward_B"], reference_logp_BT, None, cfg.reward_kl_coef)
        advantage_B = policy.map(greedy_baseline_advantages, reward_B, baseline_B)
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        metrics = policy.update(cfg.loss, trained, advantage_B=advantage_B, reference_logp_BT=reference_logp_BT)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, {"greedy_reward": float(greedy_P.nanmean())})
