"""A job of three ranks, one of which ends while another waits for it, waits for room, and hands it something.

Argument: a folder; each rank writes there what it was told, RANK.json. A program of its own, since a process of it ends: what
the others notice is that the kernel closes its lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from aligner.reshard.transfer.shared_memory import ROOMS
from tests.reshard.transfer.shared_memory_on_ranks import connected, failure, room


def main() -> None:
    dist.init_process_group("gloo")
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(errors(dist.get_rank())))
    os._exit(0)  # nobody waits for those that are gone


def errors(rank: int) -> list[str]:
    """What rank 0 is told when rank 2 has ended."""
    lines = connected()
    message = room(lines, 10)
    if rank == 0:
        for _ in range(ROOMS - 1):
            lines.hand(2, room(lines, 10))
    dist.barrier()
    if rank == 2:
        return []
    time.sleep(1.0)
    waits = [lambda: lines.take(2), lines.wait_for_room, lambda: lines.hand(2, message)]
    return [failure(wait) for wait in waits] if rank == 0 else []


if __name__ == "__main__":
    main()
