"""Memory of tensors that is given back and allocated again where it was: views and aliases stay valid."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FreedStorages:
    """The distinct storages of `tensors`, at their sizes now."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = list({(s := tensor.untyped_storage())._cdata: s for tensor in tensors}.values())
        self._sizes = [storage.nbytes() for storage in self._storages]

    def bytes(self) -> int:
        """Their size when allocated."""
        return sum(self._sizes)

    def free(self) -> None:
        """Give the memory back."""
        for storage in self._storages:
            storage.resize_(0)

    def allocate(self, zeroed: bool = False) -> None:
        """Allocate them again, with undefined contents unless `zeroed`."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
            if zeroed:
                torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
