"""An endless, checkpointable stream of rows with a new permutation in each epoch."""

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
    """The permutation of range(rows) for one epoch; deterministic, so all ranks agree."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(rows).tolist())


class RowStream(Generic[Row]):
    """Rows in epoch order, endlessly; a batch at the end of an epoch continues into the next."""

    def __init__(self, rows: Sequence[Row], seed: int, shuffle: bool = True, digest: str | None = None) -> None:
        """
        Args:
            rows: all rows, at least one.
            seed: 0 or more; determines every epoch's permutation.
            shuffle: False keeps the file order in each epoch.
            known: the rows' digest, if already computed.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        assert rows, "an empty data set raises where its file is read"
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._digest = digest
        self.position = 0
        """Number of rows taken since the start, over all epochs."""

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
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
        """The position, and the identity of the data set and its order; see `load_state_dict`."""
        return {**self._kind(), "position": self.position, "digest": self.digest}

    @property
    def digest(self) -> str:
        """Digest of the rows and their order."""
        if self._digest is None:
            self._digest = digest(self._rows)
        return self._digest

    def _kind(self) -> dict[str, Any]:
        return {"rows": len(self._rows), "seed": self._seed, "shuffle": self._shuffle}

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue at the position of `state`.

        Args:
            accept_changes: allow other data: at the same position if only row contents differ; at the start of the next
                epoch if the number of rows, the seed or the shuffling differ.

        Raises:
            ValueError: the rows, the seed or the shuffling differ, so that the position would mean other rows.
        """
        own = self._kind()
        differs = [name for name in own if state[name] != own[name]]
        if accept_changes:
            passes = math.ceil(int(state["position"]) / int(state["rows"]))
            self.position = passes * len(self._rows) if differs else int(state["position"])
            return
        for name in differs:
            raise ValueError(
                f"the checkpoint's data stream has {name}={state[name]} but this run has {name}={own[name]}; "
                "resume with the same data file, seed and shuffling, or start a new run."
            )
        if state.get("digest", self.digest) != self.digest:  # checkpoints of earlier versions have none
            raise ValueError(
                f"the checkpoint's data stream has other rows (digest {state['digest']}) than this run ({self.digest}), but "
                "as many; resume with the same data file, accept the change with checkpoint.accept_changes=true, or start "
                "a new run."
            )
        self.position = int(state["position"])
