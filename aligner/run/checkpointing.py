"""Everything that decides the rest of a run, into a checkpoint and back: roles, loop, data, random states, position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aligner.check.run_folder import adopt
from aligner.checkpoint.claim import FOLDER, Start, claim, finish, how_to_start, run_id
from aligner.checkpoint.folder import step_folder
from aligner.checkpoint.loader import Checkpoint, find_checkpoint
from aligner.checkpoint.saver import Saver
from aligner.config.as_json import config_as_json
from aligner.run.random_states import restore_random_states, save_random_states
from aligner.run.resume import compare
from aligner.spmd.messages import all_gather

if TYPE_CHECKING:
    from aligner.data.mixture import Mixture
    from aligner.roles.build import Roles
    from aligner.run.job import Job
    from aligner.spmd.world import World
    from aligner.trainer.engine import TrainEngine


class RunCheckpointer:
    """One rank's part: the same calls on every rank."""

    def __init__(self, job: Job, world: World, roles: Roles, rows: Mixture) -> None:
        self.job, self.world, self.roles, self.rows = job, world, roles, rows
        self.run_dir = Path(job.config.run_dir)
        config = job.config.checkpoint
        self.driver: dict[str, Any] = {}
        """What `save` was given, after `restore`; empty in a new run."""
        self.run: str | None = None
        """The run's id, after `restore`."""
        self.saved = 0
        """The step of the last checkpoint that was begun, or gone on from; `wait` says whether it is whole."""
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
        start = all_gather(self.world, start, range(self.world.size))[0]
        checkpoint = find_checkpoint(self.world, self.run_dir / FOLDER) if start is Start.RESUME else None
        if start is Start.RESUME and checkpoint is None:
            raise ValueError(
                f"none of the checkpoints in {self.run_dir / FOLDER} is whole (see above); bring one back, choose another "
                "run_dir, or start anew with overwrite=true."
            )
        self.inputs = all_gather(self.world, self.job.inputs, range(self.world.size))[0]
        if checkpoint is not None:
            accepted = config.checkpoint.accept_changes
            compare(checkpoint.state, config_as_json(config, self.job.mask), self.inputs, accepted, say=first)
        run = None
        if first:
            earlier = run_id(self.run_dir) == ""
            run = claim(self.run_dir, start)
            if earlier:
                adopt(self.run_dir, run)
        self.run = all_gather(self.world, run, range(self.world.size))[0]
        if checkpoint is None:
            return 0
        self._load(checkpoint)
        checkpoint.close()
        self.saved = checkpoint.step
        return checkpoint.step

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.rows.load_state_dict(state["data"], accept_changes=True)  # `compare` has looked at the digests by now
        for role in self.roles.trainable:
            if role.name in state["roles"]:
                role.load_state(state["roles"][role.name], checkpoint)
        engines = state.get("engines", {"rollout": state.get("rollout")})  # a checkpoint of an earlier version had one
        for engine in self.roles.engines:
            if engines.get(engine.name):
                engine.load_state(engines[engine.name])
        self.roles.restore_kept(state["kept"])
        self.driver = state["driver"]
        if checkpoint.world == self.world.size:
            restore_random_states(checkpoint.ranks[self.world.rank]["random"], self._engines())

    def _engines(self) -> dict[str, type[TrainEngine]]:
        """The training backends that learn in this job, by name."""
        return {role.config.engine: role.engine_type for role in self.roles.trainable}

    def due(self, step: int) -> bool:
        """Whether this step ends with a checkpoint."""
        every = self.job.config.checkpoint.every
        return bool(every) and (step % every == 0 or step == self.job.config.train.steps)

    def save(self, step: int, driver: Mapping[str, Any]) -> None:
        """Start to write one.

        Args:
            driver: what the driver itself is to remember, as JSON; it matters on the first rank.
        """
        self.saved = step
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        shared: dict[str, Any] = {
            "config": config_as_json(self.job.config, self.job.mask),
            "inputs": self.inputs,
            "data": self.rows.state_dict() if self.world.rank == 0 else {},  # the digest costs others time
            "kept": self.roles.kept_values(),
            "driver": dict(driver),
            "roles": {},
            "engines": {engine.name: engine.save_state() for engine in self.roles.engines},
        }
        for role in self.roles.trainable:
            values, values_here, regions = role.save_state()
            shared["roles"][role.name] = values
            tensors |= values_here
            entries |= regions
            if self.world.rank == 0 and role.version:
                files |= {f"{role.name}/{name}": content for name, content in role.description.items()}
        own = {"tensors": entries, "random": save_random_states(self._engines())}
        self.saver.save(step, shared, own, tensors, files)

    def wait(self) -> str:
        """Until the last save is over on every rank. Returns why it is not whole; "" where it is, or there was none."""
        self.saver.wait()
        troubles = all_gather(self.world, self.saver.trouble, range(self.world.size))
        return next((trouble for trouble in troubles if trouble), "")

    def folder(self, step: int) -> Path:
        """Where a step's checkpoint stands."""
        return step_folder(self.run_dir / FOLDER, step)

    def finish(self) -> None:
        """The run is complete: everything that it leaves is whole, its last checkpoint too."""
        if self.world.rank == 0:
            finish(self.run_dir, self.job.config.train.steps)
