"""What roles hold in memory on their ranks, and what there is: an estimate before anything is built (no torch)."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.models.spec import ModelSpec
from aligner.models.tensors import parameter_count
from aligner.rollout import engines
from aligner.rollout.config import BESIDE_OTHERS
from aligner.rollout.quantization import weight_bytes as engine_weight_bytes
from aligner.spmd.mesh import Mesh
from aligner.trainer.engines import backend

if TYPE_CHECKING:
    from aligner.config.schema import Config


STATE = 12
"""Bytes of a parameter in a checkpoint: a float32 master and two moments."""


def role_bytes(config: Config, role: str, roles: Collection[str], spec: ModelSpec, mesh: Mesh, cpu: bool) -> float:
    """Bytes on one of the role's ranks, the mean over pipeline stages; activations are not counted.

    A frozen model: its weights. One that learns: its weights, float32 gradients, and two moments, with float32 masters of
    16-bit weights, over the data shards. An engine: its weights and its KV cache, where that is known (not on CUDA with
    rollout.kv_cache_mib=null).
    """
    settings = config.settings(role)
    if config.role(role).kind.runs_on == "engine":
        return engines.backend(settings.engine).bytes_per_rank(spec, mesh, settings, cpu)
    return backend(settings.engine).bytes_per_rank(spec, mesh, settings, config.learns(role, roles))


def weight_bytes(config: Config, role: str, spec: ModelSpec, mesh: Mesh) -> float:
    """Of them, those of the weights that it computes with."""
    settings = config.settings(role)
    if config.role(role).kind.runs_on == "engine":
        # experts are cut, or whole ones: as many weights
        return engine_weight_bytes(spec, settings) / (mesh.tensor * mesh.pipeline)
    return backend(settings.engine).bytes_per_rank(spec, mesh, settings, False)


@dataclass(frozen=True)
class Machine:
    """One of the hosts that a job runs on."""

    ranks: int
    """Ranks of the job on it."""
    host_bytes: int
    """Its memory."""
    device_bytes: float | None
    """Memory of each rank's GPU; None: ranks compute on the CPU."""

    @property
    def rank_bytes(self) -> float:
        """Memory of a rank: its GPU's, or its share of the host's."""
        return self.host_bytes / self.ranks if self.device_bytes is None else self.device_bytes

    @property
    def cpu(self) -> bool:
        """Ranks compute on the CPU."""
        return self.device_bytes is None


def machine_of(config: Config, world_size: int) -> Machine:
    """The machine that this is, or, in mode=check, that `check` says it will be."""
    check = config.check if config.mode == "check" else None
    device = None
    if check and check.device_gib is not None:
        device = check.device_gib * 2**30
    elif _device(bool(check)) == "cuda":
        import torch

        device = float(torch.cuda.get_device_properties(0).total_memory)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size if check else 1)))
    ranks = check.ranks_per_host if check and check.ranks_per_host is not None else here
    return Machine(min(ranks, world_size), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), device)


def _device(checking: bool) -> str:
    from aligner.spmd.device_check import check_device  # torch's import takes seconds

    try:
        return check_device()
    except ValueError as error:
        more = " For a job on other machines say what their GPUs have, such as check.device_gib=80." if checking else ""
        raise ValueError(f"{error}{more}") from None


def bytes_of_roles(
    config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh], machine: Machine
) -> dict[str, float]:
    """`role_bytes` of each role; on CUDA vLLM with kv_cache_mib=null takes gpu_memory_utilization of the device."""
    sizes = {
        role: role_bytes(config, role, specs.keys(), spec, meshes[role], machine.cpu) for role, spec in specs.items()
    }
    generating = [role for role in specs if config.role(role).kind.runs_on == "engine"]
    for role in generating if not machine.cpu else ():
        settings = config.settings(role)
        if engines.backend(settings.engine).fills_device and settings.kv_cache_mib is None:
            share: float = settings.gpu_memory_utilization or BESIDE_OTHERS
            sizes[role] = max(sizes[role], share * (machine.device_bytes or 0.0))
    return sizes


def bytes_of_rank(config: Config, sizes: Mapping[str, float], roles: Collection[str], machine: Machine) -> float:
    """What a rank with these roles holds at the same time, at least: where roles give way, the largest of them."""
    all_resident = machine.cpu or config.residency.mode == "off"
    staying = [sizes[role] for role in roles if all_resident or role in config.residency.keep]
    others = [sizes[role] for role in roles if not all_resident and role not in config.residency.keep]
    return sum(staying) + max(others, default=0.0)


def peak_of_rank(
    config: Config, sizes: Mapping[str, float], taken: Mapping[str, float], roles: Collection[str], machine: Machine
) -> tuple[float, str]:
    """(the same with what the most demanding role call takes beside it, the role whose call that is).

    Args:
        taken: activations of each role's calls, at most; a role without counts none.
    """
    peaks = []
    for role in roles:
        away = () if machine.cpu or config.residency.mode == "off" else set(roles) - {role, *config.residency.keep}
        peaks.append((sum(sizes[other] for other in roles if other not in away) + taken.get(role, 0.0), role))
    return max(peaks)


def roles_of_ranks(meshes: Mapping[str, Mesh], roles: Collection[str]) -> dict[tuple[str, ...], int]:
    """Roles that share a rank -> the first such rank."""
    of_role = {role: frozenset(meshes[role].ranks) for role in roles}
    first_ranks: dict[tuple[str, ...], int] = {}
    for rank in sorted(frozenset[int]().union(*of_role.values())):
        first_ranks.setdefault(tuple(role for role in roles if rank in of_role[role]), rank)
    return first_ranks


def check_memory(config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh], machine: Machine) -> None:
    """ValueError where what roles hold (activations not counted) is more than a host, or a GPU, has."""
    held = bytes_of_roles(config, specs, meshes, machine)
    if machine.device_bytes is None:
        need = sum(min(machine.ranks, meshes[role].size) * held[role] for role in specs)
        if config.checkpoint.every:  # a copy of what is being written
            learned = [role for role in specs if config.learns(role, specs)]
            shares = {role: min(machine.ranks, meshes[role].size) / meshes[role].size for role in learned}
            need += sum(parameter_count(specs[role]) * STATE * shares[role] for role in learned)
        if need > machine.host_bytes:
            raise ValueError(
                f"the roles on this host need about {need / 2**30:.1f} GiB, and it has {machine.host_bytes / 2**30:.1f} GiB. "
                "Raise placement.policy.tensor or pipeline over more hosts, drop algorithm.roles reference, or take a smaller "
                "model."
            )
        return
    for roles, rank in roles_of_ranks(meshes, specs.keys()).items():
        need = bytes_of_rank(config, held, roles, machine)
        if need > machine.device_bytes:
            parts = ", ".join(f"{role} {held[role] / 2**30:.1f}" for role in roles)
            raise ValueError(
                f"rank {rank} needs at least {need / 2**30:.1f} GiB ({parts}; activations not counted), and its GPU has "
                f"{machine.device_bytes / 2**30:.1f} GiB. Raise placement.policy.tensor or pipeline, use policy.dtype=bfloat16, "
                "residency.mode=auto, or a lower rollout.gpu_memory_utilization."
            )
