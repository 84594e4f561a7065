"""GRPO whose engines sleep in addition to their work, so that overlap can be measured on a machine with few cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from aligner.algorithms.grpo import GrpoConfig, grpo
from aligner.algorithms.step import Step
from aligner.data.prompts import Prompt
from aligner.roles.build import Roles


@dataclass(frozen=True)
class SlowGrpoConfig(GrpoConfig):
    """GRPO's settings, and the seconds that the engines sleep."""

    token_seconds: float = 0.0
    """Sleep of each engine step."""
    update_seconds: float = 0.0
    """Sleep of each optimizer step's backward pass."""


def slow_grpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: SlowGrpoConfig) -> Iterator[Step]:
    """The ordinary GRPO loop with slowed-down engines."""
    policy, rollout = roles.policy, roles.rollout
    if rollout.member:
        rollout.engine.requests.advance = slowed(rollout.engine.requests.advance, cfg.token_seconds)  # type: ignore[method-assign]
    if policy.member:
        policy.engine.backward = slowed(policy.engine.backward, cfg.update_seconds)  # type: ignore[method-assign]
    yield from grpo(roles, prompts, cfg)


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow
