"""Starting a process of multiprocessing under a keeper, so that nothing that it starts is left over; see `supervisor.py`."""

from __future__ import annotations

import io
import os
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from pathlib import Path
from typing import Any

KEEPER = Path(__file__).with_name("supervisor.py")


class KeptPopen(popen_spawn_posix.Popen):
    """A spawned process (its `pid`) below a keeper, for which this process waits: it ends last."""

    def _launch(self, process_obj: Any) -> None:
        tracker = resource_tracker.getfd()  # type: ignore[attr-defined]
        self._fds: list[int] = [*self._fds, int(tracker or 0)]
        pickled = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[attr-defined]
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), pickled)
            reduction.dump(process_obj, pickled)
        finally:
            context.set_spawning_popen(None)  # type: ignore[attr-defined]
        ours, theirs, given, give, told, tell = (*os.pipe(), *os.pipe(), *os.pipe())
        self.sentinel = ours
        self.finalizer = util.Finalize(self, util.close_fds, (ours, give))  # type: ignore[attr-defined]
        try:
            python = os.fsdecode(spawn.get_executable())
            keeper = [python, "-I", "-S", str(KEEPER), str(tell), str(os.getpid())]
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=given)
            everything = [os.fsencode(word) for word in keeper + command]
            self._keeper = util.spawnv_passfds(os.fsencode(python), everything, [*self._fds, given, theirs, tell])
        finally:
            for number in (given, theirs, tell):
                os.close(number)
        with open(told, "rb") as file:
            worker = file.read()
        if not worker:
            raise OSError(f"{KEEPER.name} could not start a worker")
        self.pid = int(worker)
        with open(give, "wb", closefd=False) as file:
            file.write(pickled.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The worker's exit code, once everything below it has ended."""
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self._keeper, flag)
            except OSError:
                return None
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
