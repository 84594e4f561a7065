"""Online DPO (Guo et al. 2024): sample two responses per prompt, rank them by reward, update with a pairwise loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.bounds import AtLeast
from aligner.data.pairs import mask_unranked_pairs, preferences_from_rewards
from aligner.data.prompts import Prompt
from aligner.objective.masked import row_sums
from aligner.roles.build import Roles


@dataclass(frozen=True)
class OnlineDpoConfig:
    """Settings of `online_dpo`; beta and the like are arguments of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; the reward may be a rule, a reward model, a judge, or several of them."""
    more_batches: Annotated[int, AtLeast(0, "0: no dynamic sampling")] = 0
    """Most extra prompt batches a step may sample to replace pairs of equal rewards (dynamic sampling)."""
    loss: Any = None
    """Pairwise loss with its arguments, as a `_target_` with `_partial_: true`."""


def online_dpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: OnlineDpoConfig) -> Iterator[Step]:
    """One policy update for each batch of prompts; pairs with equal or missing rewards are masked out."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, group_size=2, more_batches=cfg.more_batches):
        samples, scores = batch.samples, batch.scores
        preference_B = policy.map(preferences_from_rewards, scores["reward_B"])
        trained = policy.map(mask_unranked_pairs, samples, preference_B)
        loss_inputs = {}
        if reference:
            reference_logp_BT = reference.logprobs(trained)
            loss_inputs["reference_sum_B"] = reference.map(row_sums, reference_logp_BT, trained["mask_BT"])
        metrics = policy.update(cfg.loss, trained, preference_B=preference_B, **loss_inputs)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, batch.metrics)
