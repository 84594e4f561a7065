"""vLLM's garbage collections: each looks through all objects of the process (0.6 s once the libraries are imported)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncollected() -> Iterator[None]:
    """What vLLM asks of the collector is not done: it would find nothing of vLLM's own."""
    collect, freeze, unfreeze = gc.collect, gc.freeze, gc.unfreeze
    gc.collect, gc.freeze, gc.unfreeze = (lambda generation=2: 0), (lambda: None), (lambda: None)
    try:
        yield
    finally:
        gc.collect, gc.freeze, gc.unfreeze = collect, freeze, unfreeze


@contextmanager
def collector_kept(device: torch.device) -> Iterator[None]:
    """While an engine starts or ends: vLLM would hide all objects of the process from the collector, the training roles' too.

    On a CPU nothing is collected either (six times), and what was hidden before stays so; on CUDA vLLM collects to free memory
    before it measures what is left.
    """
    if device.type == "cpu":
        with uncollected():
            yield
        return
    try:
        yield
    finally:
        gc.unfreeze()
