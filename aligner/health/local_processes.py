"""The ranks' processes on this host: whether they are there, stopped or gone, and what the kernel did to them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from aligner.health.process_identity import Process, machine, process


@dataclass(frozen=True)
class RankProcess(Process):
    """A rank's process."""

    rank: int


def this_process(rank: int) -> RankProcess:
    """This rank's."""
    found = process()
    return RankProcess(found.pid, found.started, rank)


class LocalProcesses:
    """Ranks whose process numbers mean the same here: those of one host, and of one container on it."""

    def __init__(self, store: dist.Store, me: RankProcess, count: int) -> None:
        """
        Args:
            count: ranks on this host, at most.
        """
        self._store, self._me, self._count = store, me, count
        self._key = f"processes/{machine()}"
        self.known: dict[int, RankProcess] = {}
        """By rank, this one left out, as far as they have told."""
        store.append(self._key, f"{me.rank} {me.pid} {me.started};")  # type: ignore[attr-defined]  # torch's stub lacks it

    def all(self) -> Mapping[int, RankProcess]:
        """`known`, after asking for those that are missing; the store may be gone."""
        if len(self.known) < self._count - 1:
            with contextlib.suppress(RuntimeError):
                told = self._store.get(self._key).decode().split(";")[:-1]
                found = [_told(one) for one in told]
                self.known = {process.rank: process for process in found if process.rank != self._me.rank}
        return self.known

    def states(self) -> dict[int, str]:
        """Of each neighbour."""
        return {rank: process.state() for rank, process in self.all().items()}


def _told(text: str) -> RankProcess:
    rank, pid, started = map(int, text.split())
    return RankProcess(pid, started, rank)


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
