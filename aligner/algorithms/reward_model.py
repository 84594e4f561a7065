"""Reward model training on preference pairs with a Bradley-Terry loss (Stiennon et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aligner.algorithms.step import Step
from aligner.data.pairs import margins_of
from aligner.data.samples import Pairs
from aligner.roles.build import Roles


@dataclass(frozen=True)
class RewardModelingConfig:
    """Settings of `reward_modeling`."""

    roles: list[str] = field(default_factory=lambda: ["reward_model"])
    """Roles to build."""
    loss: Any = None
    """Pairwise loss with its arguments, as a `_target_` with `_partial_: true`."""
    margin: bool = False
    """Use the difference of the data's scores as the margin of the loss (Llama 2)."""


def reward_modeling(roles: Roles, pairs: Iterable[Pairs], cfg: RewardModelingConfig) -> Iterator[Step]:
    """One update of the reward model for each batch of pairs."""
    model = roles.reward_model
    for batch in pairs:
        rows = model.scatter(batch, group_size=2)
        margin_B = model.map(margins_of, rows) if cfg.margin else None
        yield Step(model.update(cfg.loss, rows, margin_B=margin_B))
