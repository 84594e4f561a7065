"""Online DPO (Guo et al. 2024): sample two responses to each prompt, let the reward rank them, take a DPO step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.bounds import AtLeast
from aligner.data.pairs import leave_out_pairs, ranked
from aligner.data.prompts import Prompt
from aligner.objective.masked import row_sums
from aligner.roles.build import Roles


@dataclass(frozen=True)
class OnlineDpoConfig:
    """The settings are those of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reference", "reward"])
    """Roles to build; the reward is a rule, a reward model, a judge, or several."""
    more_batches: Annotated[int, AtLeast(0, "0: no dynamic sampling")] = 0
    """Further batches of prompts that a step may sample to replace pairs of equal rewards."""
    loss: Any = None
    """A loss of pairs with its settings, as a `_target_` with `_partial_: true`."""


def online_dpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: OnlineDpoConfig) -> Iterator[Step]:
    """One optimizer step for each batch of prompts; pairs of equal rewards, or without one, are left out."""
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, group_size=2, more_batches=cfg.more_batches):
        samples, scores = batch.samples, batch.scores
        preference_B = policy.map(ranked, scores["reward_B"])
        trained = policy.map(leave_out_pairs, samples, preference_B)
        fields = {}
        if reference:
            reference_logp_BT = reference.logprobs(trained)
            fields["reference_sum_B"] = reference.map(row_sums, reference_logp_BT, trained["mask_BT"])
        metrics = policy.update(cfg.loss, trained, preference_B=preference_B, **fields)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, batch.report)
