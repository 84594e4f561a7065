"""Which kernels a device has for whole buckets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aligner.reshard.message.kernels_triton import Kernels


def kernels_of(device: torch.device) -> Kernels | None:
    """The Triton kernels on CUDA, or anywhere under TRITON_INTERPRET=1; None where torch's own operations must do."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from aligner.reshard.message.kernels_triton import Kernels
    except ImportError:  # torch for CUDA brings Triton on Linux only
        return None
    return Kernels(device)
