"""Replicas on part of a world, in real processes: TP2 beside a rank that only trains, then two TP1 replicas."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

ROOT = Path(__file__).parents[2]


@pytest.mark.matrix
def test_replicas_on_part_of_the_world(models: dict[str, tuple[Any, str]]) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "tests.rollout.replicas"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = fork_server.run(
        [sys.executable, *command, models["qwen2"][1], models["qwen3_tied"][1]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("replicas: ok") == 3, done.stdout + done.stderr
