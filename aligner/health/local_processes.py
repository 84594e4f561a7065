"""The ranks' processes on this host: whether they are running, stopped or gone, and OOM kills."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from aligner.health.process_identity import Process, identify, machine_id


@dataclass(frozen=True)
class RankProcess(Process):
    """A rank's process."""

    rank: int


def this_process(rank: int) -> RankProcess:
    """This rank's process."""
    identity = identify()
    return RankProcess(identity.pid, identity.started, rank)


class LocalProcesses:
    """The other ranks on this host and in this container, found through the store."""

    def __init__(self, store: dist.Store, me: RankProcess, count: int) -> None:
        """
        Args:
            store: each rank publishes its process id there.
            me: this rank's process.
            count: number of ranks on this host, at most.
        """
        self._store, self._me, self._count = store, me, count
        self._key = f"processes/{machine_id()}"
        self.known: dict[int, RankProcess] = {}
        """Rank -> process, without this rank, as far as published."""
        store.append(self._key, f"{me.rank} {me.pid} {me.started};")  # type: ignore[attr-defined]  # torch's stub lacks it

    def all(self) -> Mapping[int, RankProcess]:
        """`known`, updated from the store if ranks are missing (and the store is reachable)."""
        if len(self.known) < self._count - 1:
            with contextlib.suppress(RuntimeError):
                entries = self._store.get(self._key).decode().split(";")[:-1]
                processes = [_parse(entry) for entry in entries]
                self.known = {process.rank: process for process in processes if process.rank != self._me.rank}
        return self.known

    def states(self) -> dict[int, str]:
        """Rank -> GONE, STOPPED or RUNNING."""
        return {rank: process.state() for rank, process in self.all().items()}


def _parse(text: str) -> RankProcess:
    rank, pid, started = map(int, text.split())
    return RankProcess(pid, started, rank)


def out_of_memory_kills() -> int:
    """Number of OOM kills in this container (cgroup v2) or on this host; 0 if unknown."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            continue
        for name, _, count in (line.partition(" ") for line in lines):
            if name == key:
                return int(count)
    return 0
