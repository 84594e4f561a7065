"""How roles that share ranks share their memory (no torch)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import OneOf
from aligner.spmd.role_table import RoleSpec


@dataclass(frozen=True)
class ResidencyConfig:
    """Which role holds what on a device while another one computes there."""

    mode: Annotated[str, OneOf("off", "auto", "offload")] = "auto"
    """What a role call does with what other roles on its ranks hold and it does not need. off: nothing. auto: on CUDA it
    leaves the device; on a CPU only what can be remade is freed (KV cache, engine weights, gradients). offload: models
    go to host copies on a CPU too, which saves nothing there and tests what CUDA does."""
    keep: tuple[str, ...] = ()
    """Roles, or parts of roles such as rollout.weights, that always stay."""
    prefetch: bool = True
    """Move what the next role call needs as soon as the last one ends, as the step before went (CUDA, and offload)."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.keep and self.mode == "off":
            raise ValueError(
                f"residency.keep={list(self.keep)} says what stays, and with residency.mode=off everything does; use "
                "residency.mode=auto, or leave keep empty."
            )

    def check_roles(self, roles: Iterable[RoleSpec]) -> None:
        """Raises ValueError where `keep` names something that a job of `roles` does not hold."""
        holding = [role for role in roles if role.kind.parts]
        works = [name for role in holding for name in (role.name, *(f"{role.name}.{p}" for p in role.kind.parts))]
        for name in self.keep:
            if name not in works:
                raise ValueError(f"residency.keep has {name!r}, which this job does not hold; use {', '.join(works)}.")
