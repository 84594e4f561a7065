"""GRPO (Shao et al. 2024) and its critic-free variants: sample a group of responses per prompt, score them, compute
group-relative advantages, update the policy.

GRPO, Dr. GRPO, DAPO, GSPO, RLOO and REINFORCE++-baseline differ in `advantages`, `loss`, the reward shaping and
policy.reduction: see conf/algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from aligner.algorithms.advantages import broadcast_to_tokens, group_relative, is_per_token, two_turns
from aligner.algorithms.off_policy import proximal_logprobs
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whiten_batch
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.token_rewards import kl_penalized
from aligner.roles.build import Roles

if TYPE_CHECKING:
    from aligner.config.schema import Config


@dataclass(frozen=True)
class GrpoConfig:
    """Settings of `grpo`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; without the reference there is no KL penalty."""
    group_size: Annotated[int, AtLeast(2, "a single sample has nothing to be compared with")] = 8
    """Samples per prompt."""
    advantages: Any = None
    """Function (reward_B, group_size) -> advantage_B, as a `_target_` with `_partial_: true`; one that takes mask_BT, turn_BT and
    turn_reward_BT too returns advantage_BT, of each turn (see aligner.objective.turns)."""
    whiten: bool = False
    """Whiten advantages over all trained tokens of the global batch (REINFORCE++-baseline)."""
    length_penalty: Any = None
    """Function length_B -> term added to the reward (DAPO's overlong penalty) by the number of sampled tokens, as a `_target_`;
    null: none."""
    reward_kl_coef: float = 0.0
    """Coefficient of KL(policy || reference) in the reward, in reward per nat; a KL in the loss is algorithm.loss.kl_coef."""
    more_batches: Annotated[int, AtLeast(0, "0: no dynamic sampling")] = 0
    """Dynamic sampling (DAPO): most extra prompt batches a step may sample to replace groups whose rewards are all equal; with
    advantages of turns, groups whose advantages are all 0."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.advantages is None:
            raise ValueError("algorithm.advantages needs a _target_; see conf/algorithm/grpo.yaml.")
        name = "advantages"
        try:
            group_relative(two_turns(self.group_size), torch.zeros(self.group_size), self.advantages, self.group_size)
            name = "length_penalty"
            if self.length_penalty is not None:
                self.length_penalty(torch.ones(1, dtype=torch.long))
        except ValueError as error:
            raise ValueError(f"algorithm.{name}: {error}") from None
        if self.reward_kl_coef and "reference" not in self.roles:
            raise ValueError(
                f"algorithm.reward_kl_coef={self.reward_kl_coef} needs the reference; add it to algorithm.roles, or use 0."
            )

    def check_job(self, config: Config) -> None:
        """Raises ValueError for a length penalty that would punish every episode of several turns."""
        longest = getattr(self.length_penalty, "keywords", {}).get("max_length")
        turns, one = config.environment.max_turns, config.sampling.max_tokens
        if config.environment.enabled and longest is not None and turns > 1 and longest <= one:
            raise ValueError(
                f"algorithm.length_penalty.max_length={longest} is the limit of one turn (sampling.max_tokens={one}), and an "
                f"episode's length is that of all of its turns, up to environment.max_turns={turns}; give the number of sampled "
                f"tokens from which an episode is too long, such as {turns * one}, or length_penalty=null."
            )


def grpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: GrpoConfig) -> Iterator[Step]:
    """One policy update for each batch of prompts."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size, cfg.more_batches, cfg.advantages):
        samples, scores = batch.samples, batch.scores
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_B = policy.map(
            shape_rewards, samples, scores["reward_B"], reference_logp_BT, cfg.length_penalty, cfg.reward_kl_coef
        )
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        advantage = policy.map(group_relative, trained, reward_B, cfg.advantages, cfg.group_size)
        if cfg.whiten:
            advantage = whiten_batch(policy, policy.map(broadcast_to_tokens, advantage, trained), trained)
        per_token = cfg.whiten or is_per_token(cfg.advantages)
        loss_inputs = {"advantage_BT" if per_token else "advantage_B": advantage}
        loss_inputs |= proximal_logprobs(policy, cfg.loss, trained)
        metrics = policy.update(cfg.loss, trained, reference_logp_BT=reference_logp_BT, **loss_inputs)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, batch.metrics)


def shape_rewards(
    samples: Samples,
    reward_B: Tensor,
    reference_logp_BT: Tensor | None,
    length_penalty: Callable[[Tensor], Tensor] | None,
    kl_coef: float,
) -> Tensor:
    """reward_B plus the length penalty (of all sampled tokens), minus kl_coef times the response's KL from the reference; NaN stays NaN."""
    if length_penalty is not None:
        reward_B = reward_B + length_penalty(samples.response_len_B)
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
