"""KTO (Ethayarajh et al. 2024): learns from unpaired responses labelled desirable or undesirable."""

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
    """Settings of `kto`; beta and the weights are arguments of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "reference"])
    """Roles to build. With rollout and reward added, evaluations also generate and score responses to held-out prompts."""
    loss: Any = None
    """Loss with its arguments, as a `_target_` with `_partial_: true`."""

    def check_job(self, config: Config) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if config.data.prompts_per_step < 2:
            raise ValueError(
                f"data.prompts_per_step={config.data.prompts_per_step}: KTO estimates its reference point on responses to "
                "other prompts of the same batch, which needs two; use 2 or more (8 to 128 are usual)."
            )


def kto(roles: Roles, feedback: Iterable[Feedback], cfg: KtoConfig) -> Iterator[Step]:
    """One policy update for each batch of labelled responses."""
    policy, reference = roles.policy, roles.reference
    if reference is None:
        raise ValueError("KTO needs the reference; add reference to algorithm.roles.")
    reference_sums = ReferenceSums(reference, roles.keep(reference_sums=[]))
    for batch in feedback:
        rows = policy.scatter(batch)
        kl = mismatched_kl(policy, reference, batch)
        metrics = policy.update(
            cfg.loss, rows, label_B=policy.map(labels_of, rows), reference_sum_B=reference_sums(batch, rows), kl=kl
        )
        yield Step(metrics, extra_metrics={"kl": kl})


def mismatched_kl(policy: Policy, reference: Reference, batch: Samples) -> float:
    """KTO's reference point z_0 (equation 7 of the paper), estimated on prompts paired with responses to other prompts.

    Nats per response, 0 or more. Collective over the world.
    """
    mismatched_batch = mismatched(batch, policy.spec.max_positions)
    mismatched_rows = policy.scatter(mismatched_batch)
    sums = [
        model.map(row_sums, model.logprobs(mismatched_rows), mismatched_rows["mask_BT"]).gather()
        for model in (policy, reference)
    ]
    return reference_point(sums[0], sums[1], mismatched_batch.mask_BT)
