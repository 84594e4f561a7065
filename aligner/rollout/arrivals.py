"""Who is waiting already: asked between two tokens, without a collective."""

from __future__ import annotations

from collections.abc import Callable, Collection

from aligner.health.store import own_store
from aligner.spmd.world import World


class Arrivals:
    """A count in the job's store for each time that ranks gather."""

    def __init__(self, world: World, name: str) -> None:
        self._rank, self._store = world.rank, own_store(f"arrivals-{name}", world.attempt)
        self._times = 0

    def announce(self, ranks: Collection[int]) -> Callable[[], bool]:
        """This rank is there, if it is one of `ranks`. Every rank of the world calls it, at the same place.

        Returns:
            Whether all of `ranks` are there; asks the store, about 0.1 ms on one host.
        """
        self._times += 1
        key, store, count = str(self._times), self._store, len(ranks)
        if self._rank in ranks:
            store.add(key, 1)
        return lambda: store.add(key, 0) >= count
