"""The job's key-value store, which torchrun's rendezvous keeps over all attempts of a job that it restarts."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 600.0
"""Seconds in which all ranks must have arrived."""


def own_store(name: str, attempt: str) -> dist.Store:
    """A connection of the caller's own; keys are seen under this name and in this attempt only."""
    return dist.PrefixStore(f"aligner-{name}-{attempt}", _connect())


def agree_on_attempt(rank: int, size: int) -> str:
    """A name of this attempt of the job, the same on every rank and no other's; "" where there is no launcher.

    Keys of former attempts are still there, torch's own among them, and launchers of several hosts do not count restarts
    alike (TORCHELASTIC_RESTART_COUNT). So each process tells rank 0 a word of its own, and is told the attempt's under
    that word: nothing stale can be taken for an answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return ""
    mine = uuid.uuid4().hex
    if size == 1:
        return mine
    store = dist.PrefixStore("aligner-attempts", _connect())
    if rank:
        store.set(f"word/{rank}", mine)
        store.wait([f"answer/{mine}"], timedelta(seconds=PATIENCE))
        attempt = store.get(f"answer/{mine}").decode()
        store.add(f"heard/{attempt}", 1)
        return attempt
    answered: set[str] = set()
    end = time.monotonic() + PATIENCE
    while store.add(f"heard/{mine}", 0) < size - 1:
        words = [f"word/{other}" for other in range(1, size) if store.check([f"word/{other}"])]
        for word in (raw.decode() for raw in (store.multi_get(words) if words else [])):
            if word not in answered:  # of this attempt, or of one before, whose process is no more
                store.set(f"answer/{word}", mine)
                answered.add(word)
        if time.monotonic() > end:
            raise RuntimeError(
                f"of {size} ranks only {store.add(f'heard/{mine}', 0) + 1} arrived within {PATIENCE:.0f} s."
            )
        time.sleep(0.05)
    return mine


def _connect() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
