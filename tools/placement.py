"""Print who owns which rank: `python tools/placement.py WORLD_SIZE [KEY=VALUE ...]` (the job's own overrides)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aligner.config import compose_config, to_config
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import make_meshes

ROLES = ("policy", "reference", "rollout", "reward", "critic", "reward_model")


def cell(mesh: Mesh, rank: int) -> str:
    """What this rank is in the role: data shard, tensor slice, pipeline stage."""
    if rank not in mesh.ranks:
        return "."
    at = mesh.coordinates(rank)
    sizes = {"d": (at["data"], mesh.data), "t": (at["tensor"], mesh.tensor), "p": (at["pipeline"], mesh.pipeline), "c": (at["context"], mesh.context)}  # fmt: skip
    return " ".join(f"{axis}{index}" for axis, (index, size) in sizes.items() if size > 1) or "all"


def table(meshes: dict[str, Mesh], world_size: int) -> str:
    """One row for each rank."""
    rows = [["rank", *ROLES]]
    rows += [[str(rank), *(cell(meshes[role], rank) for role in ROLES)] for rank in range(world_size)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shapes = [f"{role}: {mesh.data} x tensor {mesh.tensor} x pipeline {mesh.pipeline}" for role, mesh in meshes.items()]
    return "\n".join(
        [*lines, "", "d: data shard or replica, t: tensor slice, p: pipeline stage, all: the whole role", *shapes]
    )


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    if not arguments or not arguments[0].isdigit() or int(arguments[0]) < 1:
        sys.stderr.write(f"usage: python tools/placement.py WORLD_SIZE [KEY=VALUE ...]; got {arguments}\n")
        return 2
    world_size = int(arguments[0])
    try:
        config = to_config(compose_config(["model.path=unused", *arguments[1:]]))
        print(table(dict(make_meshes(config.placement, world_size)), world_size))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
