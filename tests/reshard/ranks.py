"""Run a script as several real gloo ranks, under a time limit, and collect what each rank reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import fork_server

ROOT = Path(__file__).parents[2]


def run_ranks(script: Path, world: int, folder: Path, *args: str, timeout: float = 150.0) -> list[Any]:
    """One process per rank; each calls `report`. Fails with a rank's output where one fails or all hang."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    processes, outputs = [], []
    for rank in range(world):
        outputs.append(open(folder / f"{rank}.log", "w+"))  # noqa: SIM115 closed below
        processes.append(
            fork_server.Popen(
                [sys.executable, str(script), str(folder), *args],
                env=environment | {"RANK": str(rank)},
                stdout=outputs[-1],
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        )
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as hang:
        raise AssertionError(f"a rank did not end within {timeout} s:\n{_logs(folder, world)}") from hang
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for output in outputs:
            output.close()
    assert codes == [0] * world, _logs(folder, world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def start_rank(folder: Path) -> tuple[int, int]:
    """Inside a rank's process: join the group that meets in `folder`. Returns (rank, world size)."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    return rank, world


def report(folder: Path, value: Any) -> None:
    """Leave this rank's result and end the process at once: gloo may abort in a normal exit."""
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(value))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def _logs(folder: Path, world: int) -> str:
    return "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.log').read_text()[-4000:]}" for rank in range(world))
