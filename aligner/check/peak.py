"""The most that a rank holds in a role call: what its roles hold, with the activations and logits of the largest microbatch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from aligner.check.memory import Machine, bytes_of_roles, peak_of_rank, roles_of_ranks
from aligner.check.microbatch import role_activations

if TYPE_CHECKING:
    from aligner.config.schema import Config
    from aligner.data.sets import DataSets
    from aligner.models.spec import ModelSpec
    from aligner.spmd.mesh import Mesh


def peaks(
    config: Config,
    roles: Collection[str],
    specs: Mapping[str, ModelSpec],
    meshes: Mapping[str, Mesh],
    data: DataSets,
    machine: Machine,
    contexts: int = 1,
) -> dict[int, tuple[float, str]]:
    """(bytes at most, the role whose call takes them) on one rank of each set of roles that share ranks; empty where no backend
    can tell its activations. `contexts`: of an episode, see `microbatch`."""
    taken = {}
    for role, spec in specs.items():
        of_role = role_activations(config, role, roles, data, spec, meshes[role], machine.cpu, contexts)
        if of_role is not None:
            taken[role] = max(of_role.update, of_role.inference)
    if not taken:
        return {}
    held = bytes_of_roles(config, specs, meshes, machine)
    return {
        rank: peak_of_rank(config, held, taken, of_rank, machine)
        for of_rank, rank in roles_of_ranks(meshes, list(specs)).items()
    }


def check_peak(
    config: Config,
    roles: Collection[str],
    specs: Mapping[str, ModelSpec],
    meshes: Mapping[str, Mesh],
    data: DataSets,
    machine: Machine,
) -> None:
    """ValueError where a rank's GPU has less than that; a host's memory is shared and may be swapped, and is not refused. Nor are
    episodes of several contexts, which may be as long as they may and seldom are: the summary says what they would take."""
    if machine.device_bytes is None:
        return
    most = peaks(config, roles, specs, meshes, data, machine)
    if not most:
        return
    rank = max(most, key=lambda rank: most[rank])
    needed, role = most[rank]
    if needed > machine.device_bytes:
        raise ValueError(
            f"rank {rank} needs up to {needed / 2**30:.1f} GiB with the activations and logits of the largest microbatch of {role}, and "
            f"its GPU has {machine.device_bytes / 2**30:.1f} GiB. {remedies(config, role, config.learns(role, roles))}."
        )


def remedies(config: Config, role: str, learns: bool) -> str:
    """What lowers the peak of a role's calls, by the names of its settings."""
    settings, section = config.settings(role), config.role(role).section
    forward = settings.forward_micro_tokens
    lower = [f"{section}.micro_tokens={settings.micro_tokens}"] * (learns or forward is None)
    lower += [f"{section}.forward_micro_tokens={forward}"] * (forward is not None)
    ways = [f"Lower {' and '.join(lower)}"]
    if learns and settings.recompute != "full":
        ways.append(f"use {section}.recompute=full")
    ways.append(f"raise placement.{role}.tensor, pipeline or context (with sequence_parallel=true)")
    if learns:
        ways.append("use more ranks, over which the optimizer's state is sharded")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"
