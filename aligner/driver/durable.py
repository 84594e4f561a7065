"""Everything that decides the rest of a run, into a checkpoint and back: roles, loop, data, random states, position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aligner.checkpoint.claim import FOLDER, Start, claim, finish, how_to_start
from aligner.checkpoint.loader import Checkpoint, find
from aligner.checkpoint.saver import Saver
from aligner.driver.changes import check_changes
from aligner.driver.plain import plain
from aligner.driver.random_states import random_states, set_random_states
from aligner.spmd.messages import everyone

if TYPE_CHECKING:
    from aligner.data.stream import RowStream
    from aligner.driver.job import Job
    from aligner.roles import Roles
    from aligner.spmd.world import World


class Durable:
    """One rank's part: the same calls on every rank."""

    def __init__(self, job: Job, world: World, roles: Roles, rows: RowStream[Any]) -> None:
        self.job, self.world, self.roles, self.rows = job, world, roles, rows
        self.run_dir = Path(job.config.run_dir)
        config = job.config.checkpoint
        self.driver: dict[str, Any] = {}
        """What `save` was given, after `restore`; empty in a new run."""
        self.saver = Saver(world, self.run_dir / FOLDER, config.keep, config.beside)

    def restore(self) -> int:
        """Take the run's folder; go on from its newest whole checkpoint, where there is one.

        Returns:
            The last step that it knows; 0 where there is none.

        Raises:
            ValueError: the folder holds a run that is not to be touched, one of other settings, or only damaged ones.
        """
        config, first = self.job.config, self.world.rank == 0
        start = how_to_start(self.run_dir, config.checkpoint, config.overwrite, config.train.steps) if first else None
        start = everyone(self.world, start, range(self.world.size))[0]
        found = find(self.world, self.run_dir / FOLDER) if start is Start.RESUME else None
        if start is Start.RESUME and found is None:
            raise ValueError(
                f"none of the checkpoints in {self.run_dir / FOLDER} is whole (see above); bring one back, choose another "
                "run_dir, or start anew with overwrite=true."
            )
        if found is not None:
            check_changes(found.state["config"], plain(self.job), config.checkpoint.accept_changes, first)
        if first:
            claim(self.run_dir, start)
        if found is None:
            return 0
        self._load(found)
        found.close()
        return found.step

    def _load(self, found: Checkpoint) -> None:
        state = found.state
        self.rows.load_state_dict(state["data"])
        for role in self.roles.trainable:
            if role.name in state["roles"]:
                role.load_state(state["roles"][role.name], found)
        if "rollout" in state and "rollout" in self.job.roles:
            self.roles.rollout.load_state(state["rollout"])
        self.roles.restore_kept(state["kept"])
        self.driver = state["driver"]
        if found.world == self.world.size:
            set_random_states(found.ranks[self.world.rank]["random"])

    def due(self, step: int) -> bool:
        """Whether this step ends with a checkpoint."""
        every = self.job.config.checkpoint.every
        return bool(every) and (step % every == 0 or step == self.job.config.train.steps)

    def save(self, step: int, driver: Mapping[str, Any]) -> None:
        """Start to write one.

        Args:
            driver: what the driver itself is to remember, as JSON; it matters on the first rank.
        """
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        shared: dict[str, Any] = {
            "config": plain(self.job),
            "data": self.rows.state_dict(),
            "kept": self.roles.kept_values(),
            "driver": dict(driver),
            "roles": {},
        }
        if "rollout" in self.job.roles:
            shared["rollout"] = self.roles.rollout.save_state()
        for role in self.roles.trainable:
            values, mine, regions = role.save_state()
            shared["roles"][role.name] = values
            tensors |= mine
            entries |= regions
            if self.world.rank == 0 and role.version:
                files |= {f"{role.name}/{name}": content for name, content in role.description.items()}
        own = {"tensors": entries, "random": random_states()}
        self.saver.save(step, shared, own, tensors, files)

    def wait(self) -> None:
        """The last save is complete, on every rank."""
        self.saver.wait()
        everyone(self.world, None, range(self.world.size))

    def finish(self) -> None:
        """The run is complete."""
        self.wait()
        if self.world.rank == 0:
            finish(self.run_dir, self.job.config.train.steps)
