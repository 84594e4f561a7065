"""Supervised fine-tuning: maximum likelihood of demonstrated responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aligner.algorithms.step import Step
from aligner.data.samples import Demonstrations
from aligner.roles.build import Roles


@dataclass(frozen=True)
class SftConfig:
    """Settings of `sft`."""

    roles: list[str] = field(default_factory=lambda: ["policy"])
    """Roles to build."""
    loss: Any = None
    """Loss with its arguments, as a `_target_` with `_partial_: true`."""


def sft(roles: Roles, demonstrations: Iterable[Demonstrations], cfg: SftConfig) -> Iterator[Step]:
    """One policy update for each batch of demonstrations."""
    policy = roles.policy
    loss: Callable[..., Any] = cfg.loss
    for batch in demonstrations:
        yield Step(policy.update(loss, policy.scatter(batch)))
