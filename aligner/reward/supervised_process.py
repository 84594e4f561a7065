"""A multiprocessing process started under a supervisor, which kills everything the process started; see `supervisor.py`."""

from __future__ import annotations

import io
import os
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from pathlib import Path
from typing import Any

SUPERVISOR = Path(__file__).with_name("supervisor.py")


class SupervisedPopen(popen_spawn_posix.Popen):
    """A spawned process (`pid`) below a supervisor process. `poll` waits for the supervisor, which ends last."""

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
        sentinel_read, sentinel_write, pickle_read, pickle_write, pid_read, pid_write = (
            *os.pipe(),
            *os.pipe(),
            *os.pipe(),
        )
        self.sentinel = sentinel_read
        self.finalizer = util.Finalize(self, util.close_fds, (sentinel_read, pickle_write))  # type: ignore[attr-defined]
        try:
            python = os.fsdecode(spawn.get_executable())
            supervisor = [python, "-I", "-S", str(SUPERVISOR), str(pid_write), str(os.getpid())]
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=pickle_read)
            arguments = [os.fsencode(word) for word in supervisor + command]
            self._supervisor = util.spawnv_passfds(
                os.fsencode(python), arguments, [*self._fds, pickle_read, sentinel_write, pid_write]
            )
        finally:
            for number in (pickle_read, sentinel_write, pid_write):
                os.close(number)
        with open(pid_read, "rb") as file:
            worker = file.read()
        if not worker:
            raise OSError(f"{SUPERVISOR.name} could not start a worker")
        self.pid = int(worker)
        with open(pickle_write, "wb", closefd=False) as file:
            file.write(pickled.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The process's exit code, once it and all its descendants have ended."""
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self._supervisor, flag)
            except OSError:
                return None
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
