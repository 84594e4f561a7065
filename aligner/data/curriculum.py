"""A curriculum: the rows of an epoch in the order of a column, or of how often each prompt is solved so far.

The order of an epoch is settled when it begins, from the seed, the epoch and what was measured until then; it is part of
a checkpoint, as is what was measured, so that a run that goes on draws the same rows under any layout.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from aligner.data.digest import digest
from aligner.data.mixture_config import ORDERS, CurriculumConfig
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.stream import epoch_order, resumed_position

Row = TypeVar("Row")
UNMEASURED = 0.5
"""Success rate that stands for a prompt without samples: the one of the highest variance, so that it is soon measured."""


def ranked(score_N: np.ndarray, seed: int, epoch: int, shuffle: bool, fraction: float = 1.0) -> list[int]:
    """The rows of an epoch, those with the lowest scores first.

    Args:
        score_N: a score for each row; NaN: the row is left out.
        seed, epoch: determine the order of equal scores.
        shuffle: False keeps the order of the file among equal scores.
        fraction: of the rows that are not left out, how many the epoch has; at least one row, if there is one.
    """
    rows = np.array(epoch_order(len(score_N), seed, epoch) if shuffle else range(len(score_N)), dtype=np.int64)
    rows = rows[~np.isnan(score_N[rows])]
    ordered = rows[np.argsort(score_N[rows], kind="stable")]
    exact = 1 - 1e-12  # 0.07 * 100 is 7.000000000000001
    return ordered[: math.ceil(fraction * len(ordered) * exact)].tolist()


def column_scores(rows: Sequence[Any], column: str, descending: bool, name: str) -> np.ndarray:
    """The column of each row as a score.

    Args:
        name: what errors call the rows' source.

    Raises:
        ValueError: a row whose column is missing or not a number.
    """
    values: list[Any] = [_fields(row).get(column) for row in rows]
    for number, value in enumerate(values, start=1):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(
                f"data.curriculum.column={column}: row {number} of {name} has {column!r}={value!r}, which is not a number; "
                "give each row one, or choose another column."
            )
    return np.array(values, dtype=np.float64) * (-1 if descending else 1)


def _fields(row: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = row.chosen.fields if isinstance(row, Pair) else row.fields
    return fields


class SuccessRates:
    """How often each prompt was solved: the measured part of a curriculum by success."""

    def __init__(self, prompts: Sequence[Prompt], config: CurriculumConfig) -> None:
        self._config = config
        numbers: dict[str, int] = {}
        self._number_N = np.array([numbers.setdefault(prompt_id(prompt), len(numbers)) for prompt in prompts])
        self._ids = list(numbers)
        self._successes_U, self._samples_U = np.zeros((2, len(numbers)))  # by distinct prompt
        self.records = 0
        """Number of steps recorded since the start of this process."""

    def record(self, rewards: Mapping[int, Sequence[float]]) -> None:
        """Count the samples of a step; those of earlier steps are weighted by data.curriculum.memory.

        Args:
            rewards: row number -> rewards of its samples, in any order.
        """
        successes: Counter[int] = Counter()
        samples: Counter[int] = Counter()
        for row, of_row in rewards.items():
            number = int(self._number_N[row])
            successes[number] += sum(reward >= self._config.success_reward for reward in of_row)
            samples[number] += len(of_row)
        for number, count in samples.items():
            self._successes_U[number] = self._config.memory * self._successes_U[number] + successes[number]
            self._samples_U[number] = self._config.memory * self._samples_U[number] + count
        self.records += 1

    @property
    def _rate_U(self) -> np.ndarray:
        measured_U = self._samples_U > 0
        return np.where(measured_U, self._successes_U / np.where(measured_U, self._samples_U, 1), UNMEASURED)

    @property
    def _retired_U(self) -> np.ndarray:
        at = math.inf if self._config.retire_at is None else self._config.retire_at
        return (self._samples_U > 0) & (self._rate_U >= at)

    @property
    def rate_N(self) -> np.ndarray:
        """The success rate of each row's prompt; UNMEASURED for those without samples."""
        return self._rate_U[self._number_N]

    @property
    def retired_N(self) -> np.ndarray:
        """Which rows' prompts are solved, and left out (data.curriculum.retire_at)."""
        return self._retired_U[self._number_N]

    def scores(self, recalled: bool = False) -> np.ndarray:
        """A score for each row, the lowest first; NaN for those that are retired, unless they are `recalled`."""
        rate_N, order = self.rate_N, self._config.order or ORDERS["success"][0]
        score_N = {"easiest": -rate_N, "hardest": rate_N, "uncertain": -rate_N * (1 - rate_N)}[order]
        return score_N if recalled else np.where(self.retired_N, np.nan, score_N)

    def metrics(self) -> dict[str, float]:
        """Numbers of prompts that were measured, and that are retired."""
        return {
            "curriculum/measured": float((self._samples_U > 0).sum()),
            "curriculum/retired": float(self._retired_U.sum()),
        }

    def state_dict(self) -> dict[str, list[float]]:
        """Prompt id -> [successes, samples] of those that were measured."""
        counts = zip(self._ids, self._successes_U.tolist(), self._samples_U.tolist(), strict=True)
        return {name: [successes, samples] for name, successes, samples in counts if samples}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """What `state_dict` gave, as far as these prompts are among it."""
        counts_U2 = np.array([state.get(name, (0.0, 0.0)) for name in self._ids], dtype=np.float64)
        self._successes_U, self._samples_U = counts_U2[:, 0].copy(), counts_U2[:, 1].copy()


def prompt_id(prompt: Prompt) -> str:
    """Identity of a prompt, by its tokens: rows that ask the same are measured together, in whichever file they are."""
    return xxhash.xxh3_64_hexdigest(array("q", prompt.tokens).tobytes())


class CurriculumStream(Generic[Row]):
    """Endless rows in epochs ordered by a curriculum: as `RowStream`, with the same interface."""

    def __init__(
        self,
        rows: Sequence[Row],
        config: CurriculumConfig,
        seed: int,
        shuffle: bool = True,
        digest: str | None = None,
        name: str = "data.path",
    ) -> None:
        """
        Args:
            rows: all rows, at least one.
            seed: 0 or more; with the epoch it determines the order of rows of equal score.
            digest: the rows' digest, if already computed.
            name: what errors call the rows' source.

        Raises:
            ValueError: a row without the column.
        """
        assert rows, "an empty data set raises where its file is read"
        self._rows, self._config, self._seed, self._shuffle, self._digest = rows, config, seed, shuffle, digest
        self.rates: SuccessRates | None = None
        """What was measured, of a curriculum by success."""
        if config.by == "success":
            self.rates = SuccessRates([row for row in rows if isinstance(row, Prompt)], config)
        else:
            self._column = column_scores(rows, config.column or "", config.order == "descending", name)
        self.position = 0
        """Number of rows taken since the start, over all epochs."""
        self.epoch = 0
        """Number of complete epochs so far."""
        self._offset = 0
        self._order: list[int] = []
        """The rows of the present epoch, if it has begun (_offset > 0 or `_begin` has been called)."""
        self._recalled = False
        self._empty_at = -1
        """`rates.records` when the coming epoch was last seen to have no rows; -1: never."""

    def take(self, count: int) -> list[Row]:
        """The next `count` rows. When every row is retired, all come again for an epoch."""
        taken: list[Row] = []
        while len(taken) < count:
            if self.idle:
                self._recalled, self._empty_at = True, -1
                self._begin()
            rows = self._order[self._offset : self._offset + count - len(taken)]
            taken += [self._rows[row] for row in rows]
            self._offset += len(rows)
            self.position += len(rows)
            if self._offset == len(self._order):
                self.next_epoch()
        return taken

    @property
    def idle(self) -> bool:
        """Whether every row is retired, so that the coming epoch has none."""
        self._begin()
        return not self._order

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self._offset, self._order, self._recalled = self.epoch + 1, 0, [], False
        self._empty_at = -1

    def _begin(self) -> None:
        """Settle the order of an epoch that has not begun."""
        records = self.rates.records if self.rates else 0
        if not self._order and records != self._empty_at:
            self._order = ranked(self._scores(), self._seed, self.epoch, self._shuffle, self._config.fraction)
            self._empty_at = records if not self._order else -1

    def _scores(self) -> np.ndarray:
        if self.rates is None:
            return self._column
        return self.rates.scores(self._recalled)

    def metrics(self) -> dict[str, float]:
        """Of the curriculum so far."""
        return self.rates.metrics() if self.rates else {}

    @property
    def digest(self) -> str:
        """Digest of the rows and their order."""
        if self._digest is None:
            self._digest = digest(self._rows)
        return self._digest

    def _kind(self) -> dict[str, Any]:
        return {"rows": len(self._rows), "seed": self._seed, "shuffle": self._shuffle}

    def state_dict(self) -> dict[str, Any]:
        """The position with the present epoch's order, what was measured, and the identity of the data set."""
        place = {"position": self.position, "epoch": self.epoch, "offset": self._offset, "order": self._order}
        measured = self.rates.state_dict() if self.rates else {}
        return {**self._kind(), **place, "recalled": self._recalled, "measured": measured, "digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue at the position of `state`.

        Args:
            accept_changes: allow other data: what was measured is kept for the prompts that are still there; if the number of
                rows, the seed or the shuffling differ, at the start of the next epoch. A checkpoint without a curriculum
                goes on there too.

        Raises:
            ValueError: the rows, the seed or the shuffling differ, so that the position would mean other rows.
        """
        resumed_position(state, self._kind(), lambda: self.digest, accept_changes)
        self.position = int(state["position"])
        if self.rates is not None:
            self.rates.load_state_dict(state.get("measured", {}))
        self.epoch = int(state.get("epoch", 0))
        if "order" in state and all(state[name] == value for name, value in self._kind().items()):
            self._offset, self._order = int(state["offset"]), list(state["order"])
            self._recalled = bool(state["recalled"])
        else:
            self.next_epoch()
