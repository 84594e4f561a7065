"""Checkpoints are written by a thread of each rank beside training; the first rank's gives them their name."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from aligner.checkpoint import folder
from aligner.checkpoint.folder import STATE, Sum, partial_folder, publish, rank_file
from aligner.health.store import own_store
from aligner.spmd.world import World

PATIENCE = 3600.0
"""Seconds that the first rank waits for the others' files."""
POLL = 0.05
_SAVERS = itertools.count()
"""Of this process, in the same order on every rank: each has keys of its own."""


class _Unwritten(Exception):
    """A rank's part; the message says whose and why."""


class Saver:
    """One rank's part in the writing. A save that fails costs a warning: training goes on, older checkpoints stay."""

    def __init__(self, world: World, root: Path, keep: int, beside: bool) -> None:
        self.world, self.root, self.keep, self.beside = world, root, keep, beside
        self._store = own_store(f"checkpoints-{next(_SAVERS)}", world.attempt)
        self._thread: threading.Thread | None = None
        self._saves, self._began = 0, 0.0
        self.last: Path | None = None
        """The newest checkpoint (first rank)."""
        self.trouble = ""
        """Why the last save is not whole, as far as this rank knows; the first one knows of all."""

    def save(
        self,
        step: int,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
    ) -> None:
        """Start a checkpoint of this moment, after the last one is complete; every rank calls it.

        Args:
            shared: what all ranks know; the first one writes it. The values may change afterwards.
            own: what this rank alone knows.
            tensors: on the host, the saver's own from here on.
            files: further small files, by their names in the folder; the first one writes them.
        """
        self.wait()
        self._saves, self.trouble = self._saves + 1, ""
        texts = json.dumps(shared), json.dumps(own)
        self._began = time.perf_counter()
        self._thread = threading.Thread(
            target=self._write, args=(step, self._saves, *texts, tensors, files), name="aligner-checkpoint", daemon=True
        )
        self._thread.start()
        if not self.beside:
            self.wait()

    def wait(self) -> None:
        """Until this rank's part of the last save is done; on the first rank, until it has its name, or `trouble` says why
        it has none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, step: int, number: int, shared: str, own: str, tensors: Mapping[str, Tensor], more: Mapping[str, bytes]
    ) -> None:
        rank, partial = self.world.rank, partial_folder(self.root, step)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            files: dict[str, Sum] = {}
            small = {rank_file(rank, "json"): own.encode()}
            if rank == 0:
                small |= {STATE: shared.encode(), **more}
            for name, content in small.items():
                (partial / name).parent.mkdir(exist_ok=True)
                files[name] = folder.write_bytes(partial / name, content)
            name = rank_file(rank, "safetensors")
            files[name] = folder.write_tensors(partial / name, tensors, self.world.activity.tick)
            said = {"files": files}
        except Exception as error:
            self.trouble = f"rank {rank}: {_line(error)}"
            if not isinstance(error, OSError):
                traceback.print_exception(error)
            said = {"error": self.trouble}  # type: ignore[dict-item]
        try:
            self._store.set(f"{number}/{rank}", json.dumps(said))
        except Exception as error:  # the launcher has ended, which the job's watch tells
            self.trouble = f"rank {rank} could not tell that it had written its part: {_line(error)}"
        if rank == 0:
            self._publish(step, number)

    @staticmethod
    def _check_here(partial: Path, files: Mapping[str, Any]) -> None:
        missing = [name for name in files if not (partial / name).is_file()]
        if missing:
            raise OSError(
                f"{missing[0]} was written on another host and is not seen on the first; put run_dir on a file system that "
                "all hosts share"
            )

    def _publish(self, step: int, number: int) -> None:
        """First rank: when everyone has written."""
        size = self.world.size
        try:
            keys = [f"{number}/{rank}" for rank in range(size)]
            end = time.monotonic() + PATIENCE
            while not self._store.check(keys):
                if time.monotonic() > end:
                    raise OSError(f"not all ranks had written their part after {PATIENCE:.0f} s")
                time.sleep(POLL)
            said = [json.loads(self._store.get(key)) for key in keys]
            errors = [one["error"] for one in said if "error" in one]
            if errors:
                raise _Unwritten("; ".join(errors))
            files = {name: tuple(found) for one in said for name, found in one["files"].items()}
            self._check_here(partial_folder(self.root, step), files)
            more = {"seconds": round(time.perf_counter() - self._began, 3)}
            self.last = publish(self.root, step, size, files, self.keep, more)  # type: ignore[arg-type]
        except Exception as error:
            # Any: a thread's error would be nobody's. What is neither the disk's fault nor the launcher's is shown whole.
            self.trouble = str(error) if isinstance(error, _Unwritten) else _line(error)
            launcher_gone = isinstance(error, dist.DistError)
            if not launcher_gone and not isinstance(error, (OSError, _Unwritten)):
                traceback.print_exception(error)
            shutil.rmtree(partial_folder(self.root, step), ignore_errors=True)
            last = f"last good checkpoint is {self.last.name if self.last else 'none of this run'}.\n"
            sys.stderr.write(
                f"aligner: WARNING: the checkpoint of step {step} could not be written: {self.trouble.rstrip('.')}. "
                + (f"The {last}" if launcher_gone else f"Training goes on; the {last}")
            )
            sys.stderr.flush()


def _line(error: Exception) -> str:
    """An operating system's error says enough by itself; of others one wants to know the kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
