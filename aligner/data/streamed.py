"""Sets that are larger than memory: rows are read and tokenized when their turn comes, ahead of the step, by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from aligner.data.left_out import LeftOut
from aligner.data.order import EpochOrder
from aligner.data.row_tokenizer import RowErrors, RowTokenizer, first_errors
from aligner.data.sources.source import RowSource
from aligner.data.stream import resumed_position

Example = TypeVar("Example")
SAMPLED = 256
"""Rows at the beginning of a streamed set that are tokenized before the job starts, to check them."""
AHEAD = 4
"""Batches that are tokenized ahead."""


@dataclass
class StreamedExamples(Generic[Example]):
    """A set of which no row is held in memory."""

    source: RowSource
    tokenize: RowTokenizer[Example]
    """A tokenizer of the thread's own: a fast tokenizer does not serve two threads at once."""
    errors: RowErrors
    longest: int
    """Upper bound of an example's tokens."""
    first: int = 0
    """`index` of the first row."""
    sample: list[Example] = field(default_factory=list)
    """Examples of the first SAMPLED rows."""

    def __len__(self) -> int:
        """Rows of the source."""
        return len(self.source)

    def examples(self, row: int) -> list[Example]:
        """The examples of one row: one mostly; none if it is left out. Their `index` is the row's number, counted
        from `first`."""
        return self.errors.examples(self.source, row, self.tokenize, self.first + row)

    def read_sample(self) -> None:
        """Fill `sample`. What is left out of it is not counted: these rows come again.

        Raises:
            ValueError: a row that cannot be used.
        """
        self.sample = [example for row in range(min(SAMPLED, len(self))) for example in self.examples(row)]
        self.tokenize.left_out.clear()


@dataclass(frozen=True)
class _Taken(Generic[Example]):
    """What the thread hands over: the examples of one row and the position after it; or the error of one."""

    position: int
    examples: list[Example]
    left_out: LeftOut
    error: BaseException | None = None


class ExampleStream(Generic[Example]):
    """Endless examples of a streamed set in epoch order (see `EpochOrder`), with an exact position: as `RowStream`, for rows
    that are not in memory."""

    def __init__(
        self, rows: StreamedExamples[Example], seed: int, shuffle: bool, batch: int, digest: str | None = None
    ) -> None:
        """
        Args:
            rows: the set.
            seed: 0 or more; determines the order.
            shuffle: False keeps the order of the files in each epoch.
            batch: examples that are usually taken at a time; AHEAD times as many are tokenized ahead.
            digest: the source's, if already computed.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        self._set, self._seed, self._shuffle, self._digest = rows, seed, shuffle, digest
        self._order = EpochOrder(len(rows), rows.source.blocks(), seed, shuffle)
        self._ahead = AHEAD * batch
        self.position = 0
        """Rows of the source that were taken completely, over all epochs."""
        self._offset = 0
        """Examples that were taken of the row at `position`."""
        self._current: _Taken[Example] | None = None
        self._queue: queue.Queue[_Taken[Example]] | None = None
        self._left_out: LeftOut = Counter()
        self._left_out_before: LeftOut = Counter()
        self._waited = 0.0

    @property
    def epoch(self) -> int:
        """Number of complete epochs so far."""
        return self.position // len(self._set)

    @property
    def idle(self) -> bool:
        """Whether the coming epoch has no rows: never."""
        return False

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.position, self._offset = (self.epoch + 1) * len(self._set), 0
        self._queue = self._current = None

    def take(self, count: int) -> list[Example]:
        """The next `count` examples.

        Raises:
            ValueError: a row that cannot be used, or two epochs without an example.
        """
        start = time.perf_counter()
        examples: list[Example] = []
        while len(examples) < count:
            current = self._next_row()
            chosen = current.examples[self._offset : self._offset + count - len(examples)]
            examples += chosen
            self._offset += len(chosen)
            if self._offset == len(current.examples):
                self.position, self._left_out = current.position, current.left_out
                self._offset, self._current = 0, None
        self._waited += time.perf_counter() - start
        return examples

    def metrics(self) -> dict[str, float]:
        """Of the step since the last call: seconds that it waited for rows; rows left out since the start, if any."""
        waited, self._waited = self._waited, 0.0
        left_out = self.left_out.total()
        return {"data/wait_seconds": waited, **({"data/left_out": float(left_out)} if left_out else {})}

    @property
    def left_out(self) -> LeftOut:
        """What was left out since the run's start, before the position."""
        return self._left_out_before + self._left_out

    def _next_row(self) -> _Taken[Example]:
        """The row at `position`, from the thread."""
        if self._current is None:
            if self._queue is None:
                self._queue = queue.Queue(self._ahead)
                arguments = (self._queue, self.position)
                threading.Thread(target=self._tokenize_ahead, args=arguments, name="tokenize", daemon=True).start()
            taken = self._queue.get()
            if taken.error is not None:
                self._queue = None  # its thread has ended
                raise taken.error
            self._current = taken
        return self._current

    def _tokenize_ahead(self, handed: queue.Queue[_Taken[Example]], place: int) -> None:
        """The thread: rows from `place` on, in order, until `handed` is no longer this stream's queue."""
        without = 0
        while handed is self._queue:
            try:
                examples = self._set.examples(self._order.row(place))
                without = 0 if examples else without + 1
                if without >= 2 * len(self._set):  # two epochs' orders may have almost as many in a row
                    raise ValueError(f"{self._set.tokenize.none_left()}{first_errors(self._set.errors)}")
            except BaseException as error:
                handed.put(_Taken(place, [], Counter(), error))
                return
            place += 1
            if examples:
                handed.put(_Taken(place, examples, +Counter(self._set.tokenize.left_out)))

    def state_dict(self) -> dict[str, Any]:
        """The position, and the identity of the set and its order; see `load_state_dict`."""
        position = {"position": self.position, "offset": self._offset, "left_out": dict(self.left_out)}
        return {**self._kind(), **position, "digest": self.digest}

    @property
    def digest(self) -> str:
        """Digest of the source."""
        if self._digest is None:
            self._digest = self._set.source.digest()
        return self._digest

    def _kind(self) -> dict[str, Any]:
        return {"rows": len(self._set), "seed": self._seed, "shuffle": self._shuffle}

    def load_state_dict(self, state: Mapping[str, Any], accept_changes: bool = False) -> None:
        """Continue at the position of `state`.

        Args:
            accept_changes: allow other data; see `RowStream.load_state_dict`.

        Raises:
            ValueError: the rows, the seed or the shuffling differ, so that the position would mean other rows.
        """
        self.position = resumed_position(state, self._kind(), lambda: self.digest, accept_changes)
        same_place = self.position == int(state["position"])
        self._offset = int(state.get("offset", 0)) if same_place else 0
        self._left_out_before = Counter(state.get("left_out", {}))
        self._queue = self._current = None
