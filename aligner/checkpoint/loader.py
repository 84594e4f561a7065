"""The newest whole checkpoint, found and verified by all ranks together, and read under any layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aligner.checkpoint.folder import STATE, Broken, complete, rank_file, read_json, read_manifest, verify
from aligner.models.stored import Entry
from aligner.spmd.messages import all_gather
from aligner.spmd.world import World


def find(world: World, root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none. A collective of the world.

    The ranks share the reading of its files; one that is damaged is named, and the next older one taken.
    """
    candidates = all_gather(world, [path.name for path in complete(root)], range(world.size))[0]
    for name in candidates:
        folder, wrong = root / name, None
        manifest: dict[str, Any] = {}
        try:
            manifest = read_manifest(folder)
            mine = sorted(manifest["files"])[world.rank :: world.size]
            verify(folder, {file: manifest["files"][file] for file in mine}, world.activity.tick)
        except (Broken, OSError) as error:
            wrong = str(error)
        found = [said for said in all_gather(world, wrong, range(world.size)) if said]
        if not found:
            return Checkpoint(folder, manifest)
        if world.rank == 0:
            sys.stderr.write(f"aligner: WARNING: checkpoint {name} is not whole and is passed over: {found[0]}.\n")
            sys.stderr.flush()
    return None


class Checkpoint:
    """One that is whole. `policy.saved` reads its tensors."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step, self.world = path, int(manifest["step"]), int(manifest["world"])
        self._stack = ExitStack()
        self._files: dict[int, Any] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What all ranks knew."""
        found: dict[str, Any] = read_json(self.path / STATE)
        return found

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """What each rank of the world that wrote it knew."""
        return [read_json(self.path / rank_file(rank, "json")) for rank in range(self.world)]

    def entries(self, key: str) -> Iterator[tuple[int, Entry]]:
        """(rank, piece) of everything that was saved under `key`."""
        for rank, own in enumerate(self.ranks):
            for entry in own["tensors"].get(key, ()):
                yield rank, entry

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor of that rank's file, mapped."""
        if rank not in self._files:
            file = safe_open(self.path / rank_file(rank, "safetensors"), framework="pt", device="cpu")
            self._files[rank] = self._stack.enter_context(file)
        return self._files[rank].get_tensor(name)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Nothing more is read."""
        self._stack.close()
        self._files.clear()
