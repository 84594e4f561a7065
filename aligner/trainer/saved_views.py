"""Activations that autograd rebuilds in the backward instead of keeping them: copies of rows of larger tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_as_views(*rebuilt: tuple[Tensor, Callable[[], Tensor]]) -> AbstractContextManager[Any]:
    """Context in which autograd saves views (shape, stride, offset) of some tensors instead of the tensors.

    Args:
        rebuilt: (a tensor, what makes one of the same values and layout again in the backward).
    """
    rebuild_of = {tensor.untyped_storage().data_ptr(): rebuild for tensor, rebuild in rebuilt}

    def pack(x: Tensor) -> Any:
        rebuild = rebuild_of.get(x.untyped_storage().data_ptr())
        return x if rebuild is None else (rebuild, x.size(), x.stride(), x.storage_offset())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        rebuild, *view = saved
        return rebuild().as_strided(*view)  # type: ignore[no-any-return]

    return saved_tensors_hooks(pack, unpack)
