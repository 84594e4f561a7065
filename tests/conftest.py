"""Run a program as a torchrun job on this machine, with a time limit: a hang is a failure, not a wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("any machine", deadline=None)  # a busy machine is no failing test
settings.load_profile("any machine")
Torchrun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def torchrun(tmp_path: Path) -> Torchrun:
    """torchrun(ranks, source_or_arguments, seconds=...): a Python source text, or a list such as ["-m", "aligner.main"]."""

    def run(
        ranks: int, program: str | list[str], *, seconds: float = 150, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        if isinstance(program, str):
            script = tmp_path / "program.py"
            script.write_text(textwrap.dedent(program))
            program = [str(script)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
        paths = os.pathsep.join([str(ROOT), str(tmp_path)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}
        # a session of its own, so that a job over its limit goes with all its ranks
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"no end within {seconds} s\n{out[-3000:]}\n{err[-5000:]}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
