"""The job's world: process groups, device, journal, watch; its start and its clean end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.journal import Journal
from aligner.health.process_exit import exit_process
from aligner.health.store import agree_on_attempt, own_store
from aligner.health.timeline import Timeline
from aligner.health.watch import Watch
from aligner.spmd.cpu_collectives import CpuCollectives
from aligner.spmd.device_check import check_device
from aligner.spmd.device_clock import DeviceClock
from aligner.spmd.residency import Residency


class World:
    """All ranks of the torchrun job: rank, device, process groups, journal.

    CPU tensors use gloo and CUDA tensors NCCL, in the same groups.
    """

    def __init__(
        self, timeout_seconds: float = 1800.0, hang: HangConfig | None = None, run_dir: str | Path | None = None
    ) -> None:
        """
        Args:
            timeout_seconds: limit of one collective.
            run_dir: folder for fault reports; None: console only.

        Raises:
            ValueError: torch sees no GPU where there should be one; see `check_device`.
        """
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29555")
        for name, value in (("RANK", self.rank), ("WORLD_SIZE", self.size), ("LOCAL_RANK", self.local_rank)):
            os.environ.setdefault(name, str(value))
        cuda = check_device() == "cuda"
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.attempt = agree_on_attempt(self.rank, self.size)
        """Name of this attempt; a launcher may restart the job."""
        store: dict[str, Any] = {}
        if self.attempt:
            store = {"store": own_store("world", self.attempt), "rank": self.rank, "world_size": self.size}
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **store)
        self.journal = Journal(self.rank)
        self.activity = Activity()
        self.timeline = Timeline(self.rank, self.activity, DeviceClock(self.device) if cuda else None)
        self.residency = Residency(self.device)
        self.watch = Watch(self.journal, self.activity, self.rank, self.size, self.attempt, hang, run_dir)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._cpu_collectives: dict[dist.ProcessGroup, CpuCollectives] = {}
        self._closers: list[Callable[[], Any]] = []

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The process group of exactly these ranks, made once. A collective: every rank of the world calls it.

        Returns:
            The group, or None on ranks outside it.
        """
        key = tuple(ranks)
        if key not in self._groups:
            self._groups[key] = dist.new_group(list(key))
        return self._groups[key] if self.rank in key else None

    def my_group(self, groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """Create all `groups` (collective over the world); returns this rank's group, or None."""
        process_groups = [self.group(ranks) for ranks in groups]
        return next((group for group in process_groups if group is not None), None)

    def cpu_collectives(self, group: dist.ProcessGroup) -> CpuCollectives | None:
        """Collectives for large tensors of a CPU, made once; None on CUDA, where NCCL's are used. A collective over `group`."""
        if self.device.type != "cpu":
            return None
        if group not in self._cpu_collectives:
            self._cpu_collectives[group] = CpuCollectives(group)
        return self._cpu_collectives[group]

    def on_leave(self, close: Callable[[], Any]) -> None:
        """Register `close` to run when the job ends without an error, last registered first."""
        self._closers.append(close)

    def leave(self) -> NoReturn:
        """End without error: a barrier, then process groups are destroyed and the process exits with 0.

        The interpreter's own teardown is skipped: after object collectives and backward passes it can abort
        ("terminate called without an active exception") once everything has succeeded.
        """
        for close in reversed(self._closers):
            close()
        self.journal.enter("end of the job")
        with self.timeline.span("wait", "all ranks", range(self.size)):
            dist.barrier()
        self.watch.stop()
        dist.destroy_process_group()
        exit_process(0)

    def fail(self, error: BaseException) -> NoReturn:
        """End with an error: write the fault report, exit with status 1.

        A ValueError is a user error and is shown without a traceback.
        """
        self.watch.fail(error, describe(error))
        exit_process(1)


def describe(error: BaseException) -> str:
    """The error in one line for the console."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
