"""Everything that decides the rest of a run, into a checkpoint and back: roles, loop, data, random states, position."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aligner.checkpoint.loader import Checkpoint, find
from aligner.checkpoint.saver import Saver
from aligner.driver.changes import report_changes
from aligner.driver.plain import plain

if TYPE_CHECKING:
    from aligner.data.stream import RowStream
    from aligner.driver.job import Job
    from aligner.roles import Roles
    from aligner.spmd.world import World

FOLDER = "checkpoints"


class Durable:
    """One rank's part: the same calls on every rank."""

    def __init__(self, job: Job, world: World, roles: Roles, stream: RowStream[Any]) -> None:
        self.job, self.world, self.roles, self.stream = job, world, roles, stream
        config = job.config.checkpoint
        self.root = Path(job.config.run_dir) / FOLDER
        self.saver = Saver(world, self.root, config.keep, config.beside)

    def restore(self) -> int:
        """Go on from the newest whole checkpoint.

        Returns:
            The last step that it knows; 0 where there is none.

        Raises:
            ValueError: the configuration has changed in a way that cannot be gone on with.
        """
        found = find(self.world, self.root) if self.job.config.checkpoint.resume else None
        if found is None:
            return 0
        report_changes(found.state["config"], plain(self.job.config), say=self.world.rank == 0)
        self._load(found)
        found.close()
        return found.step

    def _load(self, found: Checkpoint) -> None:
        state = found.state
        self.stream.load_state_dict(state["data"])
        for role in self.roles.trainable:
            if role.name in state["roles"]:
                role.load_state(state["roles"][role.name], found)
        if "rollout" in state:
            self.roles.rollout.load_state(state["rollout"])
        self.roles.restore_kept(state["kept"])
        mine = found.ranks[self.world.rank] if self.world.rank < found.world else {}
        if "random" in mine and found.world == self.world.size:
            _set_random_states(mine["random"])

    def due(self, step: int) -> bool:
        """Whether this step ends with a checkpoint."""
        every = self.job.config.checkpoint.every
        return bool(every) and step % every == 0

    def save(self, step: int) -> None:
        """Start to write one."""
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        shared: dict[str, Any] = {
            "config": plain(self.job.config),
            "data": self.stream.state_dict(),
            "kept": self.roles.kept_values(),
            "roles": {},
        }
        if "rollout" in self.job.roles:
            shared["rollout"] = self.roles.rollout.save_state()
        for role in self.roles.trainable:
            values, mine, regions = role.save_state()
            shared["roles"][role.name] = values
            tensors |= mine
            entries |= regions
        own = {"tensors": entries, "random": _random_states()}
        self.saver.save(step, shared, own, tensors)

    def finish(self) -> None:
        """The last save is complete."""
        self.saver.wait()


def _random_states() -> dict[str, Any]:
    """Python's, numpy's and torch's, as JSON; what samples are drawn with is no part of them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return found


def _set_random_states(found: Mapping[str, Any]) -> None:
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(found["torch"]))
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(found["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
