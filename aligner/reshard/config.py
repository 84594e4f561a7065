"""Settings of weight syncs from a policy to rollout engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import MoreThan


@dataclass(frozen=True)
class ReshardConfig:
    """Weight transfers."""

    bucket_mib: Annotated[float, MoreThan(0)] = 32.0
    """Bound on messages: a transfer takes at most twice this much extra memory on a rank, in MiB."""
    verify: bool = True
    """Prove each transfer: what the engine holds is what the policy held, bit for bit."""
    shared_memory: bool = True
    """On CPUs, ranks of one host exchange messages through shared memory; false: over gloo, as between hosts."""
    deltas: bool = False
    """Send only the elements that changed since the last transfer; keeps a copy of what was sent on both ends. Over gloo."""

    @property
    def bucket_bytes(self) -> int:
        return max(1, round(self.bucket_mib * (1 << 20)))
