"""Stacks of a rank that hangs or crashes, dumped by faulthandler (C code, without Python's lock) to a file of the run."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from pathlib import Path
from typing import TextIO


def stack_file(folder: Path, rank: int) -> Path:
    """The file for a rank's stacks."""
    return folder / f"rank{rank:05d}.stack"


class CrashStacks:
    """Dumps all threads' stacks if `restart_timer` is not called for `after` seconds, or at a crash (SIGSEGV, SIGABRT, ...)."""

    def __init__(self, folder: Path | None, rank: int, after: float) -> None:
        """
        Args:
            folder: where the stack file is written; None: nowhere.
            after: seconds without `restart_timer` until the stacks are dumped.
        """
        self._after = after
        self._file: TextIO | None = None
        if folder is None:
            return
        with contextlib.suppress(OSError):  # an unwritable run folder is reported elsewhere
            folder.mkdir(parents=True, exist_ok=True)
            self._file = stack_file(folder, rank).open("w")
            faulthandler.enable(self._file)

    def restart_timer(self) -> None:
        """Restart the timer and discard what was dumped."""
        if self._file is not None:
            if os.fstat(self._file.fileno()).st_size:
                os.ftruncate(self._file.fileno(), 0)
                os.lseek(self._file.fileno(), 0, os.SEEK_SET)
            faulthandler.dump_traceback_later(self._after, file=self._file)

    def close(self) -> None:
        """Stop the timer and remove the file."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            self._file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
                os.rmdir(os.path.dirname(self._file.name))
            self._file = None
