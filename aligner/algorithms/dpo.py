"""Offline DPO and its variants on preference pairs (Rafailov et al. 2023): IPO, robust DPO, ORPO, SimPO differ in `loss`.

Reference-free losses (ORPO, SimPO) leave the reference out of `roles`.
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
    """Settings of `dpo`; beta and the like are arguments of the loss."""

    roles: list[str] = field(default_factory=lambda: ["policy", "reference"])
    """Roles to build. With rollout and reward added, evaluations also generate and score responses to held-out prompts."""
    loss: Any = None
    """Pairwise loss with its arguments, as a `_target_` with `_partial_: true`."""


def dpo(roles: Roles, pairs: Iterable[Pairs], cfg: DpoConfig) -> Iterator[Step]:
    """policy.epochs x policy.minibatches optimizer steps for each batch of pairs."""
    policy = roles.policy
    state = roles.keep(reference_sums=[])
    reference_sums = ReferenceSums(roles.reference, state) if roles.reference else None
    for batch in pairs:
        rows = policy.scatter(batch, group_size=2, minibatches=policy.config.minibatches)
        loss_inputs = {"reference_sum_B": reference_sums(batch, rows)} if reference_sums else {}
        yield Step(policy.update(cfg.loss, rows, **loss_inputs))
