"""Run a torchrun job on this machine, with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fork_server import Popen


def launch(
    ranks: int, program: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node=RANKS PROGRAM` in a session of its own.

    Ends when nobody holds its output open any more, ranks that outlive their launcher among them. Over its time limit it is
    killed with its ranks, and TimeoutExpired has what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    options = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "start_new_session": True,
    }
    with Popen(command, cwd=cwd, env=env, text=True, errors="replace", **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            _kill(process.pid)
            late.output, late.stderr = process.communicate()
            raise
        except BaseException:
            _kill(process.pid)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _kill(launcher: int) -> None:
    """A launcher and its ranks, which are leaders of sessions of their own."""
    ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for leader in [launcher, *map(int, ranks)]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
