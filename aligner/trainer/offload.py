"""Offloading of weights, gradients and optimizer state: `Part`s of residency whose tensors keep their identity, so views stay
valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BUCKET_BYTES = 256 << 20
"""Host memory is allocated in blocks of this many bytes: CUDA's pinned allocator rounds sizes up to a power of two."""

Tensors = Callable[[], Iterable[Tensor]]


class Offloaded:
    """A part that is offloaded to host memory: on CUDA pinned, by asynchronous copies on `stream`.

    The host copy is kept; if the part has not changed since it was brought back, evicting it copies nothing.
    """

    def __init__(self, tensors: Tensors, stream: torch.cuda.Stream | None) -> None:
        """
        Args:
            tensors: returns the part's present tensors; those that share a storage count once.
            stream: for the copies; None on a CPU.
        """
        self.resident = True
        self._tensors, self._stream = tensors, stream
        self._storages: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._host: list[Tensor] = []
        self._host_is_current = False
        """Whether the host copy equals the device's values."""

    def bytes(self) -> int:
        """Bytes on the device while resident."""
        return sum(s.nbytes() for s in storages(self._tensors())) if self.resident else sum(self._sizes)

    def changed(self) -> None:
        """The device's values are about to change: the host copy becomes stale."""
        self._host_is_current = False

    def evict(self) -> None:
        """Copy to the host, unless its copy is current, and free the storages."""
        self._storages = storages(self._tensors())
        self._sizes = [storage.nbytes() for storage in self._storages]
        with self._copy_stream():
            if not self._host_is_current:
                self._allocate_host()
                for device, host in self._matching_slices():
                    host.copy_(device, non_blocking=self._stream is not None)
            for storage in self._storages:
                if self._stream is not None:  # the allocator reuses the memory only after the copy
                    _bytes(storage).record_stream(self._stream)
                storage.resize_(0)
        self.resident, self._host_is_current = False, True

    def bring(self) -> None:
        """Allocate the storages again and copy the values back."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        with self._copy_stream():
            for device, host in self._matching_slices():
                device.copy_(host, non_blocking=self._stream is not None)
        self.resident = True

    def _copy_stream(self) -> Any:
        """Context in which copies are enqueued: the side stream, after all work enqueued so far on the current one."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _allocate_host(self) -> None:
        total = sum(self._sizes)
        if sum(block.numel() for block in self._host) != total:
            cuda = self._stream is not None
            sizes = [min(BUCKET_BYTES, total - start) for start in range(0, total, BUCKET_BYTES)]
            self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for size in sizes]

    def _matching_slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(device, host) slices of equal size, over the storages and the host blocks in order."""
        block, used = 0, 0
        for storage in self._storages:
            values, done = _bytes(storage), 0
            while done < values.numel():
                size = min(values.numel() - done, self._host[block].numel() - used)
                yield values[done : done + size], self._host[block][used : used + size]
                done, used = done + size, used + size
                if used == self._host[block].numel():
                    block, used = block + 1, 0


class Scratch:
    """A part whose contents are not needed between role calls: gradients, which are zeroed at the start of an update."""

    def __init__(self, tensors: Tensors) -> None:
        self.resident = True
        self._tensors = tensors
        self._freed: list[tuple[torch.UntypedStorage, int]] = []

    def bytes(self) -> int:
        """Bytes on the device while resident."""
        if not self.resident:
            return sum(size for _, size in self._freed)
        return sum(storage.nbytes() for storage in storages(self._tensors()))

    def changed(self) -> None:
        """Nothing to keep."""

    def evict(self) -> None:
        """Free the storages."""
        self._freed = [(storage, storage.nbytes()) for storage in storages(self._tensors())]
        for storage, _ in self._freed:
            storage.resize_(0)
        self.resident = False

    def bring(self) -> None:
        """Allocate the storages again, zeroed."""
        for storage, size in self._freed:
            storage.resize_(size)
            _bytes(storage).zero_()
        self.resident = True


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The distinct storages of some tensors."""
    return list({(s := tensor.untyped_storage())._cdata: s for tensor in tensors}.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A uint8 view of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
