"""The job's key-value store, which torchrun's rendezvous keeps."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def own_store(name: str) -> dist.Store:
    """A connection of the caller's own to the store of this attempt of the job; keys are seen under this name only."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"aligner-{name}-{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{attempt}", tcp)
