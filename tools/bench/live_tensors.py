"""Peak of what a computation allocates: on a CPU the bytes of the tensors that live, added up; on CUDA the allocator's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class LiveTensorBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live tensors created under it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, partial(self.track, created=False), (args, kwargs))
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, partial(self.track, created=True), result)
        return result

    def track(self, tensor: torch.Tensor, created: bool) -> None:
        """Count a new storage, unless it is first seen as an argument: then it existed before."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known[storage] = True
        if created:
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, count: int) -> None:
        self.bytes += count
        self.peak = max(self.peak, self.bytes)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of `work` above the memory before it, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensorBytes() as live:
        work()
    return live.peak
