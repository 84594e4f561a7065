"""An endless, checkpointable stream of rows with a new permutation in each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from aligner.data.digest import digest

Row = TypeVar("Row")


@lru_cache(maxsize=8)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of range(rows) for one epoch; deterministic, so all ranks agree."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(rows).tolist())


@lru_cache(maxsize=8)
def epoch_draws(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """As many draws from range(rows) with replacement; deterministic, so all ranks agree."""
    return tuple(np.random.default_rng([seed, epoch, rows]).integers(rows, size=rows).tolist())


class RowStream(Generic[Row]):
    """Rows in epoch order, endlessly; a batch at the end of an epoch continues into the next."""

    def __init__(
        self, rows: Sequence[Row], seed: int, shuffle: bool = True, digest: str | None = None, replacement: bool = False
    ) -> None:
        """
        Args:
            rows: all rows, at least one.
            seed: 0 or more; determines every epoch's permutation.
            shuffle: False keeps the file order in each epoch.
            digest: the rows' digest, if already computed.
            replacement: draw rows with replacement; an epoch is as many draws as there are rows.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        assert rows, "an empty data set raises where its file is read"
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._digest = digest
        self._replacement = replacement
        self.position = 0
        """Number of rows taken since the start, over all epochs."""

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
        return self.position // len(self._rows)

    @property
    def idle(self) -> bool:
        """Whether the coming epoch has no rows: never."""
        return False

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.position = (self.epoch + 1) * len(self._rows)

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        places = range(self.position, self.position + count)
        self.position += count
        return [self._rows[self._index(place)] for place in places]

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._rows))
        if self._replacement:
            return epoch_draws(len(self._rows), self._seed, epoch)[offset]
        return epoch_order(len(self._rows), self._seed, epoch)[offset] if self._shuffle else offset

    def metrics(self) -> dict[str, float]:
        """Of the step since the last call: nothing, because all rows are in memory."""
        return {}

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
        self.position = resumed_position(state, self._kind(), lambda: self.digest, accept_changes)


def resumed_position(
    state: Mapping[str, Any], own: Mapping[str, Any], digest: Callable[[], str], accept_changes: bool
) -> int:
    """The position at which a stream goes on from a checkpoint's `state`; see `RowStream.load_state_dict`.

    Args:
        own: this run's 'rows', 'seed' and 'shuffle'.
        digest: gives the digest of this run's rows.
    """
    differs = [name for name in own if state[name] != own[name]]
    if accept_changes:
        passes = math.ceil(int(state["position"]) / int(state["rows"]))
        return passes * int(own["rows"]) if differs else int(state["position"])
    for name in differs:
        raise ValueError(
            f"the checkpoint's data stream has {name}={state[name]} but this run has {name}={own[name]}; "
            "resume with the same data file, seed and shuffling, or start a new run."
        )
    if "digest" in state and state["digest"] != digest():  # checkpoints of earlier versions have none
        raise ValueError(
            f"the checkpoint's data stream has other rows (digest {state['digest']}) than this run ({digest()}), but "
            "as many; resume with the same data file, accept the change with checkpoint.accept_changes=true, or start "
            "a new run."
        )
    return int(state["position"])
