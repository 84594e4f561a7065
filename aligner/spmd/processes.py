"""The ranks' processes on this host: whether they are there, stopped or gone, and what the kernel did to them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

GONE = "gone"
STOPPED = "stopped"
HERE = "here"


@dataclass(frozen=True)
class Process:
    """A rank's process, told from a later one of the same number by when it started."""

    rank: int
    pid: int
    started: int
    """Clock ticks after the host's start; 0 without /proc."""

    def state(self) -> str:
        """GONE (ended, or a zombie), STOPPED (SIGSTOP, a debugger) or HERE."""
        found = _stat(self.pid)
        if found is None:
            return HERE if not self.started and _answers(self.pid) else GONE
        letter, started = found
        if started != self.started or letter in "ZXx":
            return GONE
        return STOPPED if letter in "Tt" else HERE


def this_process(rank: int) -> Process:
    """This rank's."""
    found = _stat(os.getpid())
    return Process(rank, os.getpid(), found[1] if found else 0)


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class Neighbours:
    """Ranks whose process numbers mean the same here: those of one host, and of one container on it."""

    def __init__(self, store: dist.Store, me: Process, count: int) -> None:
        """
        Args:
            count: ranks on this host, at most.
        """
        self._store, self._me, self._count = store, me, count
        self._key = f"processes/{_machine()}"
        self.known: dict[int, Process] = {}
        """By rank, this one left out, as far as they have told."""
        store.append(self._key, f"{me.rank} {me.pid} {me.started};")  # type: ignore[attr-defined]  # torch's stub lacks it

    def all(self) -> Mapping[int, Process]:
        """`known`, after asking for those that are missing; the store may be gone."""
        if len(self.known) < self._count - 1:
            with contextlib.suppress(RuntimeError):
                told = self._store.get(self._key).decode().split(";")[:-1]
                found = [Process(*map(int, one.split())) for one in told]
                self.known = {process.rank: process for process in found if process.rank != self._me.rank}
        return self.known

    def states(self) -> dict[int, str]:
        """Of each neighbour."""
        return {rank: process.state() for rank, process in self.all().items()}


def _machine() -> str:
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return "/".join(parts)


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed for memory in this container (cgroup v2), or on this host; 0 if not known."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            continue
        for name, _, count in (line.partition(" ") for line in lines):
            if name == key:
                return int(count)
    return 0
