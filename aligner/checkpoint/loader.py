"""Find and verify the newest complete checkpoint, and read its state and tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aligner.checkpoint.folder import STATE, DamagedCheckpoint, complete, rank_file, read_json, read_manifest, verify
from aligner.models.stored import Entry
from aligner.spmd.messages import all_gather
from aligner.spmd.world import World


def find_checkpoint(world: World, root: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint, or None. Collective over the world.

    The ranks share the verification of its files. A damaged checkpoint is reported and the next older one is tried.
    """
    candidates = all_gather(world, [path.name for path in complete(root)], range(world.size))[0]
    for name in candidates:
        folder, error_text = root / name, None
        manifest: dict[str, Any] = {}
        try:
            manifest = read_manifest(folder)
            own_files = sorted(manifest["files"])[world.rank :: world.size]
            verify(folder, {file: manifest["files"][file] for file in own_files}, world.activity.tick)
        except (DamagedCheckpoint, OSError) as error:
            error_text = str(error)
        errors = [error for error in all_gather(world, error_text, range(world.size)) if error]
        if not errors:
            return Checkpoint(folder, manifest)
        if world.rank == 0:
            sys.stderr.write(f"aligner: WARNING: checkpoint {name} is damaged and skipped: {errors[0]}.\n")
            sys.stderr.flush()
    return None


class Checkpoint:
    """A complete, verified checkpoint. `trainer.optimizer_checkpoint` reads its tensors."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step, self.world = path, int(manifest["step"]), int(manifest["world"])
        self._stack = ExitStack()
        self._files: dict[int, Any] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """The state shared by all ranks."""
        state: dict[str, Any] = read_json(self.path / STATE)
        return state

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """The state of each rank that wrote it."""
        return [read_json(self.path / rank_file(rank, "json")) for rank in range(self.world)]

    def entries(self, key: str) -> Iterator[tuple[int, Entry]]:
        """(rank, entry) of all tensors saved under `key`."""
        for rank, own in enumerate(self.ranks):
            for entry in own["tensors"].get(key, ()):
                yield rank, entry

    def tensor(self, rank: int, name: str) -> Tensor:
        """A tensor of that rank's file, memory-mapped."""
        if rank not in self._files:
            file = safe_open(self.path / rank_file(rank, "safetensors"), framework="pt", device="cpu")
            self._files[rank] = self._stack.enter_context(file)
        return self._files[rank].get_tensor(name)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close all files."""
        self._stack.close()
        self._files.clear()
