"""Releasing the engine's memory while other roles compute: weights, rewritten by the next sync, and KV caches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from aligner.rollout.freed_storages import FreedStorages
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.transformers.requests import BatchedRequests


class FreedWeights:
    """Parameters, whose storages are freed and allocated again where they are."""

    def __init__(self, tensors: Iterable[Tensor], loaded: LoadedWeights) -> None:
        self.resident = True
        self._loaded = loaded
        self._storages = FreedStorages(tensors)

    def bytes(self) -> int:
        """Its size."""
        return self._storages.bytes()

    def changed(self) -> None:
        """Nothing is kept."""

    def evict(self) -> None:
        """Free the weights; the engine cannot generate until the next sync."""
        self._loaded.evict()
        self._storages.free()
        self.resident = False

    def bring(self) -> None:
        """Allocate the storages, for a sync to write."""
        self._storages.allocate()
        self.resident = True


class DroppedCaches:
    """The KV caches of what is under way, which is read anew afterwards."""

    def __init__(self, requests: BatchedRequests) -> None:
        self.resident = True
        self._requests = requests

    def bytes(self) -> int:
        """Its size now: it grows with what is generated."""
        return self._requests.cache_bytes()

    def changed(self) -> None:
        """Nothing is kept."""

    def evict(self) -> None:
        """Drop the caches."""
        self._requests.forget_caches()
        self.resident = False

    def bring(self) -> None:
        """The next token makes them."""
        self.resident = True
