"""The job's key-value store (torchrun's TCPStore), which persists across all attempts of a restarted job."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 600.0
"""Seconds within which all ranks must have arrived."""


def own_store(name: str, attempt: str) -> dist.Store:
    """A new connection with a key prefix for this name and attempt."""
    return dist.PrefixStore(f"aligner-{name}-{attempt}", _connect())


def agree_on_attempt(rank: int, size: int) -> str:
    """A unique id of this attempt of the job, the same on all ranks; "" without a launcher.

    Keys of earlier attempts persist in the store, and TORCHELASTIC_RESTART_COUNT may differ between hosts. So each process
    sends rank 0 a random token and receives the attempt's id under that token: a stale key cannot be mistaken for an
    answer.

    Raises:
        RuntimeError: not all ranks arrived within PATIENCE.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return ""
    token = uuid.uuid4().hex
    if size == 1:
        return token
    store = dist.PrefixStore("aligner-attempts", _connect())
    if rank:
        store.set(f"word/{rank}", token)
        store.wait([f"answer/{token}"], timedelta(seconds=PATIENCE))
        attempt = store.get(f"answer/{token}").decode()
        store.add(f"heard/{attempt}", 1)
        return attempt
    answered: set[str] = set()
    end = time.monotonic() + PATIENCE
    while store.add(f"heard/{token}", 0) < size - 1:
        keys = [f"word/{other}" for other in range(1, size) if store.check([f"word/{other}"])]
        for other_token in (raw.decode() for raw in (store.multi_get(keys) if keys else [])):
            if other_token not in answered:  # of this attempt, or of an earlier one whose process has ended
                store.set(f"answer/{other_token}", token)
                answered.add(other_token)
        if time.monotonic() > end:
            raise RuntimeError(
                f"of {size} ranks only {store.add(f'heard/{token}', 0) + 1} arrived within {PATIENCE:.0f} s."
            )
        time.sleep(0.05)
    return token


def _connect() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
