"""GRPO (Shao et al. 2024) and its critic-free variants: sample a group of responses per prompt, score them, compute
group-relative advantages, update the policy.

GRPO, Dr. GRPO, DAPO, GSPO, RLOO and REINFORCE++-baseline differ in `advantages`, `loss`, the reward shaping and
policy.reduction: see conf/algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from aligner.algorithms.off_policy import proximal_logprobs
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whiten_batch
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.masked import apply_mask
from aligner.objective.token_rewards import kl_penalized
from aligner.roles.build import Roles


@dataclass(frozen=True)
class GrpoConfig:
    """Settings of `grpo`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; without the reference there is no KL penalty."""
    group_size: Annotated[int, AtLeast(2, "a single sample has nothing to be compared with")] = 8
    """Samples per prompt."""
    advantages: Any = None
    """Function (reward_B, group_size) -> advantage_B, as a `_target_` with `_partial_: true`."""
    whiten: bool = False
    """Whiten advantages over all trained tokens of the global batch (REINFORCE++-baseline)."""
    length_penalty: Any = None
    """Function length_B -> term added to the reward (DAPO's overlong penalty), as a `_target_`; null: none."""
    reward_kl_coef: float = 0.0
    """Coefficient of KL(policy || reference) in the reward, in reward per nat; a KL in the loss is algorithm.loss.kl_coef."""
    more_batches: Annotated[int, AtLeast(0, "0: no dynamic sampling")] = 0
    """Dynamic sampling (DAPO): most extra prompt batches a step may sample to replace groups whose rewards are all equal."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.advantages is None:
            raise ValueError("algorithm.advantages needs a _target_; see conf/algorithm/grpo.yaml.")
        name = "advantages"
        try:
            self.advantages(torch.zeros(self.group_size), group_size=self.group_size)
            name = "length_penalty"
            if self.length_penalty is not None:
                self.length_penalty(torch.ones(1, dtype=torch.long))
        except ValueError as error:
            raise ValueError(f"algorithm.{name}: {error}") from None
        if self.reward_kl_coef and "reference" not in self.roles:
            raise ValueError(
                f"algorithm.reward_kl_coef={self.reward_kl_coef} needs the reference; add it to algorithm.roles, or use 0."
            )


def grpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: GrpoConfig) -> Iterator[Step]:
    """One policy update for each batch of prompts."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size, cfg.more_batches):
        samples, scores = batch.samples, batch.scores
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_B = policy.map(
            shape_rewards, samples, scores["reward_B"], reference_logp_BT, cfg.length_penalty, cfg.reward_kl_coef
        )
        advantage_B = policy.map(cfg.advantages, reward_B, group_size=cfg.group_size)
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        if cfg.whiten:
            advantage_BT = policy.map(broadcast_to_tokens, advantage_B, trained)
            advantage = {"advantage_BT": whiten_batch(policy, advantage_BT, trained)}
        else:
            advantage = {"advantage_B": advantage_B}
        proximal = proximal_logprobs(policy, cfg.loss, trained)
        metrics = policy.update(cfg.loss, trained, reference_logp_BT=reference_logp_BT, **advantage, **proximal)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, batch.metrics)


def shape_rewards(
    samples: Samples,
    reward_B: Tensor,
    reference_logp_BT: Tensor | None,
    length_penalty: Callable[[Tensor], Tensor] | None,
    kl_coef: float,
) -> Tensor:
    """reward_B plus the length penalty, minus kl_coef times the response's KL from the reference; NaN stays NaN."""
    if length_penalty is not None:
        reward_B = reward_B + length_penalty(samples.length_B - samples.prompt_len_B)
    if kl_coef:
        assert samples.rollout_logp_BT is not None and reference_logp_BT is not None
        reward_B = kl_penalized(
            reward_B,
            mask_BT=samples.mask_BT,
            policy_logp_BT=samples.rollout_logp_BT,
            reference_logp_BT=reference_logp_BT,
            kl_coef=kl_coef,
        )
    return reward_B


def broadcast_to_tokens(advantage_B: Tensor, samples: Samples) -> Tensor:
    """[B] -> [B, T]: each row's advantage on its trained tokens, 0 elsewhere."""
    return apply_mask(samples.mask_BT, advantage_B[:, None])
