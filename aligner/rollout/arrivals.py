"""Whether all ranks have reached a weight sync: polled between two decoding steps, without a collective."""

from __future__ import annotations

from collections.abc import Callable, Collection

from aligner.health.store import own_store
from aligner.spmd.world import World


class Arrivals:
    """A counter in the job's key-value store for each meeting of ranks."""

    def __init__(self, world: World, name: str) -> None:
        self._rank, self._store = world.rank, own_store(f"arrivals-{name}", world.attempt)
        self._times = 0

    def announce(self, ranks: Collection[int]) -> Callable[[], bool]:
        """Count this rank as arrived, if it is one of `ranks`. Every rank of the world calls it, at the same place.

        Returns:
            A function that asks the store whether all of `ranks` have arrived (about 0.1 ms on one host).
        """
        self._times += 1
        key, store, count = str(self._times), self._store, len(ranks)
        if self._rank in ranks:
            store.add(key, 1)
        return lambda: store.add(key, 0) >= count
