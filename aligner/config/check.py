"""Settings of mode=check (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, MoreThan


@dataclass(frozen=True)
class CheckConfig:
    """The job that mode=check is about, where it is not to run as this command was started."""

    ranks: Annotated[int | None, AtLeast(1)] = None
    """Ranks of the job. null: torchrun's, and 1 without torchrun."""
    ranks_per_host: Annotated[int | None, AtLeast(1)] = None
    """Ranks on one host. null: torchrun's, and all without torchrun."""
    device_gib: Annotated[float | None, MoreThan(0)] = None
    """Memory of the GPU that each rank will have, in GiB. null: this machine's GPU; without one, ranks on CPUs."""
