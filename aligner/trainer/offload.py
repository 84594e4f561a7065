"""Parts of a model that leave the device and come back under the same tensors, so that aliases stay valid: `Part`s of residency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BUCKET_BYTES = 256 << 20
"""Host memory is taken in blocks of this size: CUDA's pinned allocator rounds up to a power of two."""

Tensors = Callable[[], Iterable[Tensor]]


class Offloaded:
    """A part that goes to host memory: on CUDA pinned, by asynchronous copies on `stream`.

    The host's copy is kept. What has not changed since it came back leaves without being copied again.
    """

    def __init__(self, tensors: Tensors, stream: torch.cuda.Stream | None) -> None:
        """`tensors` gives every tensor of the part as it is now; those that share a storage count once."""
        self.resident = True
        self._tensors, self._stream = tensors, stream
        self._storages: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._host: list[Tensor] = []
        self._same = False
        """Whether the host's copy is what the device holds."""

    def bytes(self) -> int:
        """Its size on the device while it is there."""
        return sum(s.nbytes() for s in storages(self._tensors())) if self.resident else sum(self._sizes)

    def changed(self) -> None:
        """The device's values are about to differ from the host's copy."""
        self._same = False

    def evict(self) -> None:
        """Copy to the host where that is needed, and free the storages."""
        self._storages = storages(self._tensors())
        self._sizes = [storage.nbytes() for storage in self._storages]
        with self._moving():
            if not self._same:
                self._make_room()
                for device, host in self._pairs():
                    host.copy_(device, non_blocking=self._stream is not None)
            for storage in self._storages:
                if self._stream is not None:  # its memory is used again only once the copy is done
                    _bytes(storage).record_stream(self._stream)
                storage.resize_(0)
        self.resident, self._same = False, True

    def bring(self) -> None:
        """Take the storages' memory again and fill it."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        with self._moving():
            for device, host in self._pairs():
                device.copy_(host, non_blocking=self._stream is not None)
        self.resident = True

    def _moving(self) -> Any:
        """On the side stream, after everything that the main one has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _make_room(self) -> None:
        total = sum(self._sizes)
        if sum(block.numel() for block in self._host) != total:
            cuda = self._stream is not None
            sizes = [min(BUCKET_BYTES, total - start) for start in range(0, total, BUCKET_BYTES)]
            self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for size in sizes]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Equal pieces of the storages and of the host's blocks, both taken one after the other."""
        block, used = 0, 0
        for storage in self._storages:
            whole, done = _bytes(storage), 0
            while done < whole.numel():
                size = min(whole.numel() - done, self._host[block].numel() - used)
                yield whole[done : done + size], self._host[block][used : used + size]
                done, used = done + size, used + size
                if used == self._host[block].numel():
                    block, used = block + 1, 0


class Scratch:
    """A part without contents between role calls: gradients, which are zeroed at the start of an update."""

    def __init__(self, tensors: Tensors) -> None:
        self.resident = True
        self._tensors = tensors
        self._freed: list[tuple[torch.UntypedStorage, int]] = []

    def bytes(self) -> int:
        """Its size on the device while it is there."""
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
        """Take the storages' memory again, zeroed."""
        for storage, size in self._freed:
            storage.resize_(size)
            _bytes(storage).zero_()
        self.resident = True


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The distinct storages behind some tensors."""
    return list({(s := tensor.untyped_storage())._cdata: s for tensor in tensors}.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
