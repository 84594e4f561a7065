"""How roles that share ranks share their memory (no torch)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, OneOf
from aligner.spmd.role_table import RoleSpec

SHARE_OF_GPU, SHARE_OF_HOST = 0.9, 0.8
"""Of what is available, in residency.budget_gib=null: libraries allocate on a GPU beside torch, and on a host other
processes, files being written and reward workers come and go."""


@dataclass(frozen=True)
class ResidencyConfig:
    """Which role holds what on a device while another one computes there."""

    mode: Annotated[str, OneOf("off", "auto", "offload")] = "auto"
    """What happens to what a role call does not need. auto: it stays where the call fits into budget_gib beside it, as
    measured on earlier steps, and else as much leaves as must, what is needed latest first: on CUDA it goes to host
    memory, on a CPU only what can be remade is freed (KV cache, engine weights, gradients). off: everything stays.
    offload: everything leaves at each call, whatever room there is, and models go to host copies on a CPU too, which
    saves nothing there and tests what CUDA does."""
    budget_gib: Annotated[float | None, AtLeast(0, "0: everything leaves that a call does not need")] = None
    """mode=auto: memory of each rank in GiB, all of its process on a CPU, what torch allocates on CUDA. null: 0.9 of what is
    free on the GPU when the job starts; on a CPU 0.8 of what the host (or the cgroup) has available then, divided by the
    ranks there; the smallest over the ranks counts for all."""
    keep: tuple[str, ...] = ()
    """Roles, or parts of roles such as rollout.weights, that always stay."""
    prefetch: bool = True
    """Move what the next role call needs as soon as the last one ends, as the step before went (CUDA, and offload)."""

    def budget(self, available: float, cpu: bool) -> float:
        """Bytes of each rank.

        Args:
            available: what is there for a rank, in bytes.
        """
        if self.budget_gib is not None:
            return self.budget_gib * 2**30
        return available * (SHARE_OF_HOST if cpu else SHARE_OF_GPU)

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.keep and self.mode == "off":
            raise ValueError(
                f"residency.keep={list(self.keep)} says what stays, and with residency.mode=off everything does; use "
                "residency.mode=auto, or leave keep empty."
            )
        if self.budget_gib is not None and self.mode != "auto":
            raise ValueError(
                f"residency.budget_gib={self.budget_gib} is what residency.mode=auto fills, and the mode is {self.mode}; use "
                "residency.mode=auto, or budget_gib=null."
            )

    def check_roles(self, roles: Iterable[RoleSpec]) -> None:
        """Raises ValueError where `keep` names something that a job of `roles` does not hold."""
        holding = [role for role in roles if role.kind.parts]
        works = [name for role in holding for name in (role.name, *(f"{role.name}.{p}" for p in role.kind.parts))]
        for name in self.keep:
            if name not in works:
                raise ValueError(f"residency.keep has {name!r}, which this job does not hold; use {', '.join(works)}.")
