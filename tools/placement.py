"""Show which roles each rank has: `python tools/placement.py WORLD_SIZE [--per-node N] [KEY=VALUE ...]` (a job's overrides).

With model.path also the estimated GiB per rank, and the parallel sizes are checked against the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.check.memory import role_bytes
from aligner.check.roles import wanted_roles
from aligner.config.schema import Config, compose_config, to_config
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec, with_scalar_head
from aligner.spmd.mesh import EXPERT_AXES, Mesh, axes, shown
from aligner.spmd.placement import make_meshes
from aligner.trainer.megatron.sizes import check_sizes

USAGE = "usage: python tools/placement.py WORLD_SIZE [--per-node N] [KEY=VALUE ...]"
UNREAD = "unread"
"""Placeholder for model.path if none is given."""
LETTERS = {
    "data": "d: data shard (rollout: replica)",
    "tensor": "t: tensor slice",
    "pipeline": "p: pipeline stage",
    "context": "c: context slice",
    "expert": "e: expert shard",
    "expert_tensor": "x: slice of each expert",
}


@dataclass(frozen=True)
class PlacementMap:
    """The placement of a job."""

    world_size: int
    per_node: int
    """Ranks per host; 0: unknown."""
    meshes: Mapping[str, Mesh]
    """Role -> mesh."""
    gib: Mapping[str, float]
    """Role -> estimated GiB on each of its ranks; empty without a model."""

    def roles_of(self, rank: int) -> list[str]:
        """The roles of a rank."""
        return [role for role, mesh in self.meshes.items() if rank in mesh.ranks]

    def row(self, rank: int) -> list[str]:
        """The table row of a rank."""
        place = [str(n) for n in (rank, *divmod(rank, self.per_node))] if self.per_node else [str(rank)]
        total = sum(self.gib.get(role, 0.0) for role in self.roles_of(rank))
        memory = [f"{total:.2f}"] if self.gib else []
        return [*place, *(cell(mesh, rank) for mesh in self.meshes.values()), *memory]

    def table(self) -> list[str]:
        """The table, one line per rank."""
        head = ["rank", *(["host", "device"] if self.per_node else []), *self.meshes, *(["GiB"] if self.gib else [])]
        rows = [head, *(self.row(rank) for rank in range(self.world_size))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def roles(self, learning: Iterable[str]) -> list[str]:
        """One line per role with its ranks, sizes and memory; then which roles share ranks."""
        width = max(map(len, self.meshes))
        lines = []
        for role, mesh in self.meshes.items():
            sizes = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in axes(mesh)) or "one rank"
            memory = f", {self.gib[role]:.2f} GiB on each" if role in self.gib else ""
            lines.append(
                f"{role.ljust(width)}  ranks {shown(mesh.ranks)}: {sizes}{memory}{', learns' * (role in learning)}"
            )
        together: dict[tuple[str, ...], list[int]] = {}
        for rank in range(self.world_size):
            together.setdefault(tuple(self.roles_of(rank)), []).append(rank)
        for roles, ranks in together.items():
            what = f"shared by {', '.join(roles)}" if len(roles) > 1 else f"{roles[0]} alone" if roles else "unused"
            lines.append(f"ranks {shown(ranks)}: {what}")
        return [*lines, *self.crossings()]

    def crossings(self) -> list[str]:
        """Warnings about tensor-parallel groups that span hosts, since they communicate in every layer."""
        warnings = []
        for role, mesh in self.meshes.items():
            groups = [
                group
                for group in mesh.groups("tensor")
                if self.per_node and len({r // self.per_node for r in group}) > 1
            ]
            if groups:
                warnings.append(
                    f"placement.{role}.tensor={mesh.tensor} spans hosts, such as ranks {shown(groups[0])}: slow"
                )
        return warnings


def cell(mesh: Mesh, rank: int) -> str:
    """The rank's coordinates in the role's mesh; "all" for a role on one rank, "." if it is not a member."""
    if rank not in mesh.ranks:
        return "."
    at = mesh.coordinates(rank, EXPERT_AXES) | mesh.coordinates(rank)
    return " ".join(f"{LETTERS[axis][0]}{at[axis]}" for axis in axes(mesh)) or "all"


def draw(config: Config, world_size: int, per_node: int) -> str:
    """Draw the placement of a job.

    Raises:
        ValueError: sizes that do not fit the ranks or the model, with the setting and the values that would work.
    """
    roles = wanted_roles(config, config.algorithm.get("roles") or ("policy", "rollout", "reward"))
    all_meshes = make_meshes(config.placement, world_size, config.roles)
    meshes = {role: all_meshes[role] for role in roles}
    gib = {}
    if config.model.path != UNREAD:
        for role in (role for role in roles if config.role(role).kind.head):
            spec = _spec(config, role)
            if config.role(role).kind.on_trainer:
                check_sizes(spec, meshes[role])
            gib[role] = role_bytes(config, role, roles, spec, meshes[role], cpu=False) / 2**30
    placement = PlacementMap(world_size, per_node, meshes, gib)
    used = [axis for axis in LETTERS if any(axis in axes(mesh) for mesh in meshes.values())]
    legend = "; ".join([*(LETTERS[axis] for axis in used), "all: the whole role", ".: not there"])
    notes = [legend] + (["GiB: weights, gradients, optimizer; no activations, no KV cache"] if gib else [])
    return "\n".join(
        [*placement.table(), "", *notes, "", *placement.roles([role for role in roles if config.learns(role, roles)])]
    )


def _spec(config: Config, role: str) -> ModelSpec:
    spec = read_spec(config.model_path(role)[1])
    return with_scalar_head(spec) if config.role(role).kind.head == "scalar" else spec


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    rest, per_node = list(arguments), "0"
    if "--per-node" in rest:
        at = rest.index("--per-node")
        per_node = "".join(rest[at + 1 : at + 2])
        rest[at : at + 2] = []
        per_node = per_node if per_node != "0" else ""
    if not rest or not rest[0].isdecimal() or int(rest[0]) < 1 or not per_node.isdecimal():
        sys.stderr.write(f"{USAGE}; got {arguments}\n")
        return 2
    try:
        config = to_config(compose_config([f"model.path={UNREAD}", *rest[1:]]))
        print(draw(config, int(rest[0]), int(per_node)))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
