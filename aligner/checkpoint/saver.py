"""Asynchronous checkpoint writing: a thread on each rank writes its part, rank 0 publishes the checkpoint."""

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
from aligner.checkpoint.folder import STATE, Checksum, partial_folder, publish_checkpoint, rank_file
from aligner.health.store import own_store
from aligner.spmd.world import World

PATIENCE = 3600.0
"""Seconds that rank 0 waits for the other ranks' files."""
POLL = 0.05
_SAVERS = itertools.count()
"""Counts the savers of this process, in the same order on all ranks; each has its own key prefix."""


class _Unwritten(Exception):
    """A rank's part could not be written; the message names the rank and the reason."""


class Saver:
    """Writes this rank's part of checkpoints. A failed save gives a warning; training continues, older checkpoints stay."""

    def __init__(self, world: World, root: Path, keep: int, beside: bool) -> None:
        """
        Args:
            root: folder of the checkpoints.
            keep: number of checkpoints to keep.
            beside: write asynchronously; False: `save` returns when the checkpoint is complete.
        """
        self.world, self.root, self.keep, self.beside = world, root, keep, beside
        self._store = own_store(f"checkpoints-{next(_SAVERS)}", world.attempt)
        self._thread: threading.Thread | None = None
        self._saves, self._began = 0, 0.0
        self.last: Path | None = None
        """The newest checkpoint (on rank 0)."""
        self.trouble = ""
        """Why the last save failed, as far as this rank knows; rank 0 knows for all ranks. "" if it did not."""

    def save(
        self,
        step: int,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
    ) -> None:
        """Start a checkpoint of the current state, after the previous one is complete. All ranks call it.

        Args:
            shared: JSON state shared by all ranks, written by rank 0; copied here.
            own: JSON state of this rank; copied here.
            tensors: CPU tensors, which the caller must not change afterwards.
            files: further small files by their names in the folder, written by rank 0.
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
        """Wait until this rank's part of the last save is written; on rank 0, until the checkpoint is published or `trouble`
        says why it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, step: int, number: int, shared: str, own: str, tensors: Mapping[str, Tensor], more: Mapping[str, bytes]
    ) -> None:
        rank, partial = self.world.rank, partial_folder(self.root, step)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            files: dict[str, Checksum] = {}
            small = {rank_file(rank, "json"): own.encode()}
            if rank == 0:
                small |= {STATE: shared.encode(), **more}
            for name, content in small.items():
                (partial / name).parent.mkdir(exist_ok=True)
                files[name] = folder.write_bytes(partial / name, content)
            name = rank_file(rank, "safetensors")
            files[name] = folder.write_tensors(partial / name, tensors, self.world.activity.tick)
            result = {"files": files}
        except Exception as error:
            self.trouble = f"rank {rank}: {_line(error)}"
            if not isinstance(error, OSError):
                traceback.print_exception(error)
            result = {"error": self.trouble}  # type: ignore[dict-item]
        try:
            self._store.set(f"{number}/{rank}", json.dumps(result))
        except Exception as error:  # the launcher has ended, which the watch reports
            self.trouble = f"rank {rank} could not report that it had written its part: {_line(error)}"
        if rank == 0:
            self._publish(step, number)

    @staticmethod
    def _check_here(partial: Path, files: Mapping[str, Any]) -> None:
        missing = [name for name in files if not (partial / name).is_file()]
        if missing:
            raise OSError(
                f"{missing[0]} was written on another host and is not visible on the first; put run_dir on a file system that "
                "all hosts share"
            )

    def _publish(self, step: int, number: int) -> None:
        """Rank 0: publish the checkpoint when all ranks have written their parts."""
        size = self.world.size
        try:
            keys = [f"{number}/{rank}" for rank in range(size)]
            end = time.monotonic() + PATIENCE
            while not self._store.check(keys):
                if time.monotonic() > end:
                    raise OSError(f"not all ranks wrote their part within {PATIENCE:.0f} s")
                time.sleep(POLL)
            results = [json.loads(self._store.get(key)) for key in keys]
            errors = [result["error"] for result in results if "error" in result]
            if errors:
                raise _Unwritten("; ".join(errors))
            files = {name: tuple(checksum) for result in results for name, checksum in result["files"].items()}
            self._check_here(partial_folder(self.root, step), files)
            more = {"seconds": round(time.perf_counter() - self._began, 3)}
            self.last = publish_checkpoint(self.root, step, size, files, self.keep, more)  # type: ignore[arg-type]
        except Exception as error:
            # All exceptions, because this is a thread. Unexpected ones are shown with a traceback.
            self.trouble = str(error) if isinstance(error, _Unwritten) else _line(error)
            launcher_gone = isinstance(error, dist.DistError)
            if not launcher_gone and not isinstance(error, (OSError, _Unwritten)):
                traceback.print_exception(error)
            shutil.rmtree(partial_folder(self.root, step), ignore_errors=True)
            last = f"last complete checkpoint is {self.last.name if self.last else 'none of this run'}.\n"
            sys.stderr.write(
                f"aligner: WARNING: the checkpoint of step {step} could not be written: {self.trouble.rstrip('.')}. "
                + (f"The {last}" if launcher_gone else f"Training continues; the {last}")
            )
            sys.stderr.flush()


def _line(error: Exception) -> str:
    """An error as one line; with its type, unless it is an OSError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
