"""DPO and its kin on pairs (Rafailov et al. 2023): IPO, robust DPO, ORPO and SimPO differ in `loss` alone.

Losses that compare with no reference (ORPO, SimPO) leave it out of `roles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aligner.algorithms.reference_sums import ReferenceSums
from aligner.algorithms.step import Step
from aligner.data.samples import Pairs
from aligner.roles.build import Roles


@dataclass(frozen=True)
class DpoConfig:
    """The settings are those of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "reference"])
    """Roles to build; with rollout and reward, held-out prompts are answered and scored in evaluations."""
    loss: Any = None
    """Loss with its settings, as a `_target_` with `_partial_: true`."""


def dpo(roles: Roles, pairs: Iterable[Pairs], cfg: DpoConfig) -> Iterator[Step]:
    """One optimizer step for each batch of pairs."""
    policy = roles.policy
    kept = roles.keep(reference_sums=[])
    reference_sums = ReferenceSums(roles.reference, kept) if roles.reference else None
    for batch in pairs:
        rows = policy.scatter(batch, group_size=2, minibatches=policy.config.minibatches)
        fields = {"reference_sum_B": reference_sums(batch, rows)} if reference_sums else {}
        yield Step(policy.update(cfg.loss, rows, **fields))
