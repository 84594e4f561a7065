"""A job of three ranks, one of which ends while another waits for it, waits for a slot, and sends it something.

Argument: a folder; each rank writes there what it was told, RANK.json. A program of its own, since a process of it ends: what
the others notice is that the kernel closes its connections.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from aligner.spmd.shared_memory import SLOTS
from tests.spmd.shared_memory_on_ranks import connected, failure, free_slot


def main() -> None:
    dist.init_process_group("gloo")
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(errors(dist.get_rank())))
    os._exit(0)  # nobody waits for those that are gone


def errors(rank: int) -> list[str]:
    """What rank 0 is told when rank 2 has ended."""
    channel = connected()
    message = free_slot(channel, 10)
    if rank == 0:
        for _ in range(SLOTS - 1):
            channel.send(2, free_slot(channel, 10))
    dist.barrier()
    if rank == 2:
        return []
    time.sleep(1.0)
    waits = [lambda: channel.receive(2), channel.wait_for_slot, lambda: channel.send(2, message)]
    return [failure(wait) for wait in waits] if rank == 0 else []


if __name__ == "__main__":
    main()
