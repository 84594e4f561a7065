"""KTO (Ethayarajh et al. 2024): answers called good or bad one by one, without pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aligner.algorithms.reference_sums import ReferenceSums
from aligner.algorithms.step import Step
from aligner.data.pairs import labels_of, mismatched
from aligner.data.samples import Feedback, Samples
from aligner.objective.masked import row_sums
from aligner.objective.preference import reference_point
from aligner.roles.build import Roles

if TYPE_CHECKING:
    from aligner.config.schema import Config
    from aligner.trainer.policy import Policy, Reference


@dataclass(frozen=True)
class KtoConfig:
    """The settings are those of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "reference"])
    """Roles to build; with rollout and reward, held-out prompts are answered and scored in evaluations."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""

    def check_job(self, config: Config) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if config.data.prompts_per_step < 2:
            raise ValueError(
                f"data.prompts_per_step={config.data.prompts_per_step}: KTO's reference point is estimated on answers to "
                "other prompts of the batch, and there is none; use 2 or more (8 to 128 are usual)."
            )


def kto(roles: Roles, feedback: Iterable[Feedback], cfg: KtoConfig) -> Iterator[Step]:
    """One optimizer step for each batch of answers."""
    policy, reference = roles.policy, roles.reference
    if reference is None:
        raise ValueError("KTO compares with the reference; add reference to algorithm.roles.")
    reference_sums = ReferenceSums(reference, roles.keep(reference_sums=[]))
    for batch in feedback:
        rows = policy.scatter(batch)
        kl = mismatched_kl(policy, reference, batch)
        metrics = policy.update(
            cfg.loss, rows, label_B=policy.map(labels_of, rows), reference_sum_B=reference_sums(batch, rows), kl=kl
        )
        yield Step(metrics, more={"kl": kl})


def mismatched_kl(policy: Policy, reference: Reference, batch: Samples) -> float:
    """z_0 of the paper's equation 7, on answers to other prompts of the batch."""
    answers = mismatched(batch, policy.spec.max_positions)
    others = policy.scatter(answers)
    sums = [model.map(row_sums, model.logprobs(others), others["mask_BT"]).gather() for model in (policy, reference)]
    return reference_point(sums[0], sums[1], answers.mask_BT)
