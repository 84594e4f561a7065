"""Which kernels a device has for whole buckets."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aligner.reshard.message.kernels_triton import Kernels


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels compute: on CUDA, or anywhere under TRITON_INTERPRET=1; else torch's own operations must do."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return importlib.util.find_spec("triton") is not None  # torch for CUDA brings it on Linux only


def kernels_of(device: torch.device) -> Kernels | None:
    """The Triton kernels of a device; None where it has none."""
    if not has_kernels(device):
        return None
    from aligner.reshard.message.kernels_triton import Kernels

    return Kernels(device)
