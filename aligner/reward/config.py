"""Settings of the reward role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardConfig:
    """A rule that runs in worker processes on the host CPUs of the reward role's ranks."""

    rule: str = "aligner.reward.rules.exact_match"
    """`package.module.function` or `path/to/file.py:function`, called as fn(prompt, response, **fields) -> float."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the rule; a row's own field of the same name comes first."""
    workers: int = 1
    """Worker processes on each rank."""
    timeout_s: float = 5.0
    """Limit for one row, in seconds."""
    max_missing: float = 0.5
    """Fraction of a batch's rows without a score (failed, timed out, unparsable) above which the job stops, 0 to 1."""
