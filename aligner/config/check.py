"""Settings of mode=check (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckConfig:
    """The job that mode=check is about, where it is not to run as this command was started."""

    ranks: int | None = None
    """Ranks of the job. null: torchrun's, and 1 without torchrun."""
    ranks_per_host: int | None = None
    """Ranks on one host. null: torchrun's, and all without torchrun."""
    device_gib: float | None = None
    """Memory of the GPU that each rank will have, in GiB. null: this machine's GPU; without one, ranks on CPUs."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        for name in ("ranks", "ranks_per_host", "device_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"check.{name}={value} must be more than 0, or null.")
