"""GRPO (Shao et al. 2024): sample a group for each prompt, score it, compare inside the group, take a clipped step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from aligner.algorithms.step import Step
from aligner.data.prompts import Prompt
from aligner.data.samples import leave_out_unscored
from aligner.objective.advantages import Normalize, group_advantages
from aligner.roles import Roles


@dataclass(frozen=True)
class GrpoConfig:
    """GRPO and its kin: variants differ in `normalize`, `loss` and policy.reduction."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; without reference there is no KL."""
    group_size: int = 8
    """Samples per prompt."""
    normalize: str = "std"
    """Divide advantages by the group's standard deviation (std) or not (none, as Dr. GRPO)."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.normalize not in get_args(Normalize):
            raise ValueError(
                f"algorithm.normalize={self.normalize} is unknown; use {' or '.join(get_args(Normalize))}."
            )
        if self.group_size < 2:
            raise ValueError(
                f"algorithm.group_size={self.group_size} leaves nothing to compare in a group, so every advantage would "
                "be 0; use 2 or more."
            )


def grpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: GrpoConfig) -> Iterator[Step]:
    """One on-policy update for each batch of prompts."""
    policy, rollout, reference, reward = roles.policy, roles.rollout, roles.reference, roles.reward
    loss: Callable[..., Any] = cfg.loss
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.generate(batch, num_samples=cfg.group_size)
        scores = reward.score(samples)
        reference_logp_BT = reference.logprobs(samples) if reference else None
        advantage_B = policy.run(
            group_advantages, scores["reward_B"], group_size=cfg.group_size, normalize=cfg.normalize
        )
        trained = policy.run(leave_out_unscored, samples, scores["reward_B"])
        metrics = policy.update(loss, trained, advantage_B=advantage_B, reference_logp_BT=reference_logp_BT)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores)
