"""Endless passes over a fixed list of rows: a new permutation each epoch, a position that can be restored exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from aligner.data.digest import digest

Row = TypeVar("Row")


@lru_cache(maxsize=8)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of range(rows) for one epoch: a function of its arguments only, so every rank has the same."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(rows).tolist())


class RowStream(Generic[Row]):
    """Rows in epoch order without end; a batch that meets the end of an epoch continues into the next."""

    def __init__(self, rows: Sequence[Row], seed: int, shuffle: bool = True, known: str | None = None) -> None:
        """
        Args:
            rows: all rows, at least one.
            seed: 0 or more; decides every epoch's permutation.
            shuffle: False keeps the file's order in each epoch.
            known: the rows' digest, where it has been computed before.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        assert rows, "an empty data set is refused where its file is read"
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._known = known
        self.position = 0
        """Rows taken since the start, over all epochs."""

    @property
    def epoch(self) -> int:
        """Complete passes so far."""
        return self.position // len(self._rows)

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        places = range(self.position, self.position + count)
        self.position += count
        return [self._rows[self._index(place)] for place in places]

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._rows))
        return epoch_order(len(self._rows), self._seed, epoch)[offset] if self._shuffle else offset

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what it is a position in."""
        return {**self._kind(), "position": self.position, "digest": self.digest}

    @property
    def digest(self) -> str:
        """Of the rows and their order."""
        if self._known is None:
            self._known = digest(self._rows)
        return self._known

    def _kind(self) -> dict[str, Any]:
        return {"rows": len(self._rows), "seed": self._seed, "shuffle": self._shuffle}

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue where `state` was taken.

        Args:
            accept_changes: with rows that differ, at the same position; where there are more or fewer of them, or they come
                in another order, from the begin of a pass over them.

        Raises:
            ValueError: the rows, the seed or the shuffling differ, so that the position would mean other rows.
        """
        mine = self._kind()
        differs = [name for name in mine if state[name] != mine[name]]
        if accept_changes:
            passes = math.ceil(int(state["position"]) / int(state["rows"]))
            self.position = passes * len(self._rows) if differs else int(state["position"])
            return
        for name in differs:
            raise ValueError(
                f"the checkpoint's data stream has {name}={state[name]} but this run has {name}={mine[name]}; "
                "resume with the same data file, seed and shuffling, or start a new run."
            )
        if state.get("digest", self.digest) != self.digest:  # checkpoints of earlier versions have none
            raise ValueError(
                f"the checkpoint's data stream has other rows (digest {state['digest']}) than this run ({self.digest}), though "
                "as many; resume with the same data file, accept the change with checkpoint.accept_changes=true, or start "
                "a new run."
            )
        self.position = int(state["position"])
