"""The order of rows in an epoch: a permutation that every rank computes alike, and that begins anywhere at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW = 8
"""Blocks whose rows are shuffled together."""
LARGEST = 1 << 20
"""Rows that count as one block at most, so that a window's permutation stays small: sets of up to WINDOW times as many rows
without blocks are shuffled as a whole."""


class EpochOrder:
    """Which row comes at a place of an epoch. Rows in blocks (see `RowSource.blocks`) are shuffled in windows: the blocks of
    the whole set in random order, and the rows of each `WINDOW` blocks among each other, so that few blocks are in use at
    a time. Rows without blocks are shuffled over the whole set, as far as LARGEST allows."""

    def __init__(self, rows: int, blocks: Sequence[range] | None, seed: int, shuffle: bool) -> None:
        """
        Args:
            rows: number of rows.
            blocks: ranges of rows that are read together; None: any row costs the same.
            seed: 0 or more; with the epoch it determines the order.
            shuffle: False: the order of the file.
        """
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        blocks = [
            range(start, min(start + LARGEST, block.stop))
            for block in blocks or [range(rows)]
            for start in range(block.start, block.stop, LARGEST)
        ]
        self._starts = np.array([block.start for block in blocks])
        self._sizes = np.array([len(block) for block in blocks])
        self._window = lru_cache(maxsize=2)(self._window_rows)
        self._epoch = lru_cache(maxsize=2)(self._epoch_blocks)

    def row(self, place: int) -> int:
        """The row at `place`, counted from the first epoch's beginning."""
        epoch, offset = divmod(place, self._rows)
        if not self._shuffle:
            return offset
        ends = self._epoch(epoch)[1]
        window = int(np.searchsorted(ends, offset, side="right"))
        return int(self._window(epoch, window)[offset - (int(ends[window - 1]) if window else 0)])

    def _epoch_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the epoch's order of blocks, the place in the epoch where each window ends)."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[order])
        return order, np.append(ends[WINDOW - 1 : -1 : WINDOW], ends[-1])

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        """The rows of one window, in their order."""
        blocks = self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        rows = np.concatenate(
            [
                np.arange(start, start + size)
                for start, size in zip(self._starts[blocks], self._sizes[blocks], strict=True)
            ]
        )
        return np.random.default_rng([self._seed, epoch, window]).permutation(rows)
