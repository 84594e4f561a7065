"""Rows of one or several sources as one endless stream, drawn by weight, with an exact position.

Which source the n-th draw takes is a function of the seed, n and which sources are exhausted: every rank draws alike, under
any layout, and a checkpoint holds the number of draws and each source's own position.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import xxhash

from aligner.data.curriculum import CurriculumStream
from aligner.data.mixture_config import MixtureConfig

BLOCK = 1024
"""Random numbers that are made together."""


class SourceStream(Protocol):
    """Endless rows of one source in epochs."""

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
        ...

    @property
    def idle(self) -> bool:
        """Whether the coming epoch has no rows."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the rows."""
        ...

    def take(self, count: int) -> list[Any]:
        """The next `count` rows."""
        ...

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the step since the last call."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, and the identity of the rows and their order."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue at the position of `state`."""
        ...


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture."""

    name: str
    stream: SourceStream
    first: int
    """`index` of its first row: the sources' rows are numbered one after the other."""
    rows: int
    """Number of its rows."""
    weight: float = 1.0
    """Its share, relative to the others'."""


class Mixture:
    """The training rows of a job in the order of the run."""

    def __init__(
        self, sources: Sequence[MixedSource], config: MixtureConfig, seed: int, success_reward: float = 0.5
    ) -> None:
        """
        Args:
            sources: at least one.
            seed: 0 or more; determines the draws.
            success_reward: samples with this reward or more are successes.
        """
        assert sources, "a job without rows raises where they are read"
        self.sources, self._config, self._seed, self._success_reward = tuple(sources), config, seed, success_reward
        self._weights = [source_weight(source.weight, source.rows, config.temperature) for source in sources]
        self._firsts = [source.first for source in sources]
        self.draws = 0
        """Number of draws of a source so far."""
        self.epoch = 0
        """Number of complete epochs of the mixture (data.mixture.exhausted=first or all)."""
        self._taken: Counter[str] = Counter()

    @property
    def measures(self) -> bool:
        """Whether the order depends on what prompts were measured to be."""
        return any(_rates(source) is not None for source in self.sources)

    @property
    def mixed(self) -> bool:
        """Whether there are several sources."""
        return len(self.sources) > 1

    def take(self, count: int) -> list[Any]:
        """The next `count` rows: those of one batch."""
        rows: list[Any] = []
        while len(rows) < count:
            source = self.sources[self._draw()]
            taken = source.stream.take(count if self._config.batches == "single" or not self.mixed else 1)
            self._taken[source.name] += len(taken)
            rows += taken
        return rows

    def _draw(self) -> int:
        """The source of the next draw."""
        available = self._available()
        if not self.mixed:
            return available[0]
        ends = list(accumulate(self._weights[place] for place in available))
        chance = _uniform(self._seed, self.draws // BLOCK)[self.draws % BLOCK]
        self.draws += 1
        return available[min(bisect_right(ends, chance * ends[-1]), len(available) - 1)]

    def _available(self) -> list[int]:
        """The sources that can be drawn from; begins an epoch of the mixture where the last one is over."""
        sources, exhausted = self.sources, self._config.exhausted
        busy = [place for place, source in enumerate(sources) if not source.stream.idle]
        busy = busy or list(range(len(sources)))  # everything is solved, and comes again
        if exhausted == "repeat" or not self.mixed:
            return busy
        rest = [place for place in busy if sources[place].stream.epoch <= self.epoch]
        if rest and (exhausted == "all" or len(rest) == len(busy)):
            return rest
        self.epoch += 1
        for place in busy:
            if sources[place].stream.epoch < self.epoch:
                sources[place].stream.next_epoch()
        return self._available()

    def source_of(self, index: int) -> MixedSource:
        """The source of the row with this `index`."""
        return self.sources[bisect_right(self._firsts, index) - 1]

    def metrics(self) -> dict[str, float]:
        """Of the step since the last call: each source's share of the rows, if there are several; and the streams' own."""
        row: dict[str, float] = {}
        for source in self.sources:
            for name, value in source.stream.metrics().items():
                row[name] = row.get(name, 0.0) + value
        drawn, self._taken = self._taken, Counter()
        if self.mixed and drawn.total():
            row |= {f"source/{source.name}_share": drawn[source.name] / drawn.total() for source in self.sources}
        return row

    def reward_metrics(self, rewards: Mapping[int, Sequence[float]]) -> dict[str, float]:
        """Each source's mean reward and share of successes, if there are several sources.

        Args:
            rewards: row index -> rewards of its samples.
        """
        by_source: dict[str, list[float]] = {}
        for index, of_row in rewards.items():
            by_source.setdefault(self.source_of(index).name, []).extend(of_row)
        row = {}
        for name, values in by_source.items() if self.mixed else ():
            row[f"source/{name}_reward"] = math.fsum(values) / len(values)
            row[f"source/{name}_success"] = sum(value >= self._success_reward for value in values) / len(values)
        return row

    def record(self, rewards: Mapping[int, Sequence[float]]) -> None:
        """Count what was measured in a step; the same on every rank.

        Args:
            rewards: row index -> rewards of its samples, in any order.
        """
        for source in self.sources:
            rates = _rates(source)
            if rates is not None:
                last = source.first + source.rows
                rates.record({i - source.first: of for i, of in rewards.items() if source.first <= i < last})

    def state_dict(self) -> dict[str, Any]:
        """The position, and the identity of each source and its order."""
        sources = {source.name: source.stream.state_dict() for source in self.sources}
        return {"draws": self.draws, "epoch": self.epoch, "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue at the position of `state`.

        Args:
            accept_changes: allow other sources: those that the checkpoint has go on (see the streams' own method), others begin.

        Raises:
            ValueError: other sources, other rows of one, or a checkpoint of an earlier version.
        """
        if "sources" not in state:
            raise ValueError("the checkpoint's data stream is of an earlier version of aligner; start a new run.")
        before, now = set(state["sources"]), {source.name for source in self.sources}
        if before != now and not accept_changes:
            raise ValueError(
                f"the checkpoint's data has the sources {', '.join(sorted(before))} but this run has {', '.join(sorted(now))}; "
                "resume with the same, accept the change with checkpoint.accept_changes=true, or start a new run."
            )
        self.draws, self.epoch = int(state["draws"]), int(state["epoch"])
        for source in self.sources:
            if source.name in before:
                source.stream.load_state_dict(state["sources"][source.name], accept_changes)


def source_weight(weight: float, rows: int, temperature: float | None) -> float:
    """weight * rows ** (1 / temperature): for equal weights p ~ n^(1/T), as in multilingual mixtures (Arivazhagan et al. 2019,
    arXiv 1907.05019); the weight alone without a temperature."""
    return weight if temperature is None else weight * rows ** (1 / temperature)


def source_seed(seed: int, name: str, mixed: bool) -> int:
    """The seed of a source's own order; a job's only source has the job's."""
    return int(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1) if mixed else seed


def _rates(source: MixedSource) -> Any:
    return source.stream.rates if isinstance(source.stream, CurriculumStream) else None


@lru_cache(maxsize=4)
def _uniform(seed: int, block: int) -> tuple[float, ...]:
    """BLOCK numbers in [0, 1)."""
    return tuple(np.random.default_rng([seed, block, BLOCK]).random(BLOCK).tolist())
