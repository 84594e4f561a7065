"""GRPO and its kin without a critic: sample a group for each prompt, score it, compare inside the group, take a step.

GRPO (Shao et al. 2024), Dr. GRPO, DAPO, GSPO, RLOO and REINFORCE++-baseline differ in `advantages`, `loss`, what is
added to the reward, and policy.reduction: see conf/algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from aligner.algorithms.off_policy import proximal
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whitened
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.masked import inside
from aligner.objective.token_rewards import kl_penalized
from aligner.roles.build import Roles


@dataclass(frozen=True)
class GrpoConfig:
    """GRPO and its kin."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; without reference there is no KL."""
    group_size: Annotated[int, AtLeast(2, "a single sample has nothing to be compared with")] = 8
    """Samples per prompt."""
    advantages: Any = None
    """(reward_B, group_size) -> advantage_B, as a `_target_` with `_partial_: true`."""
    whiten: bool = False
    """Divide advantages by their standard deviation over the tokens of the whole batch (REINFORCE++-baseline)."""
    length_penalty: Any = None
    """Response lengths -> what is added to the reward (DAPO's overlong punishment), as a `_target_`; null: nothing."""
    reward_kl_coef: float = 0.0
    """What a nat of KL(policy || reference) costs in the reward; a KL in the loss is algorithm.loss.kl_coef."""
    more_batches: Annotated[int, AtLeast(0, "0: no dynamic sampling")] = 0
    """Dynamic sampling (DAPO): further batches of prompts that a step may sample to replace groups of equal rewards."""
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
    """One update for each batch of prompts."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size, cfg.more_batches):
        samples, scores = batch.samples, batch.scores
        reference_logp_BT = reference.logprobs(samples) if reference else None
        reward_B = policy.map(
            shaped, samples, scores["reward_B"], reference_logp_BT, cfg.length_penalty, cfg.reward_kl_coef
        )
        advantage_B = policy.map(cfg.advantages, reward_B, group_size=cfg.group_size)
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        if cfg.whiten:
            advantage = {"advantage_BT": whitened(policy, policy.map(on_tokens, advantage_B, trained), trained)}
        else:
            advantage = {"advantage_B": advantage_B}
        more = proximal(policy, cfg.loss, trained)
        metrics = policy.update(cfg.loss, trained, reference_logp_BT=reference_logp_BT, **advantage, **more)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, batch.report)


def shaped(
    samples: Samples,
    reward_B: Tensor,
    reference_logp_BT: Tensor | None,
    length_penalty: Callable[[Tensor], Tensor] | None,
    kl_coef: float,
) -> Tensor:
    """The reward with what its response's length and distance from the reference cost; NaN stays NaN."""
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


def on_tokens(advantage_B: Tensor, samples: Samples) -> Tensor:
    """A row's advantage on each of its trained tokens."""
    return inside(samples.mask_BT, advantage_B[:, None])
