"""Run a reward rule in CPU worker processes; a rule that hangs, crashes or raises affects only its row."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from aligner.reward.signals import start_tracker
from aligner.reward.worker import (
    EXIT_ZERO,
    Score,
    Status,
    WorkerContext,
    enter_worker,
    needed_fields,
    rule_problem,
    score_rows,
)

__all__ = ["RulePool", "Score", "Status"]

IMPORT_LIMIT_S = 120.0
POOL_RESTARTS = 3
SIGNAL_RETRIES = 3
"""Attempts for a row during which an external signal arrived (a rule may send itself one each time)."""
GIVE_UP_S = 30.0
"""Seconds after which a call whose rows all timed out so far gives up on the rest."""

CHUNK_S = 0.02
"""Rows travel to a worker together where they take no longer than this in all: a message costs as much as a fast rule."""


class _Task(NamedTuple):
    """What a worker does for a row: the row alone, or a chunk of rows."""

    future: Future[list[Score]]
    place: int
    """The row's, among those of the task."""
    alone: bool


class RulePool:
    """A pool of worker processes for one rule. Workers see no GPU and import neither torch nor the job's main module."""

    def __init__(
        self,
        rule: str,
        kwargs: Mapping[str, Any] | None = None,
        workers: int = 2,
        timeout_s: float = 5.0,
        where: str = "reward",
        memory_bytes: int | None = None,
    ) -> None:
        """
        Args:
            rule: `package.module.function` or `path/to/file.py:function`; see `aligner.reward.rules`.
            kwargs: arguments for all rows; a row's field of the same name takes precedence.
            workers: number of processes.
            timeout_s: limit per row, in seconds, without the import of the rule.
            where: prefix of the settings rule, kwargs, ... in messages.
            memory_bytes: limit per worker; beyond it the row fails with MemoryError. None: no limit.

        Raises:
            ValueError: the rule cannot be imported or called with these arguments; names the setting.
        """
        if workers < 1:
            raise ValueError(f"{where}.workers={workers} must be 1 or more.")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"{where}.timeout_s={timeout_s} must be a positive number of seconds.")
        self._where = where
        path, _, function = rule.rpartition(":")
        # Absolute, because replacement workers may start after a change of the working directory.
        self._rule = f"{os.path.abspath(path)}:{function}" if path.endswith(".py") else rule
        self._kwargs = dict(kwargs or {})
        self._workers = workers
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._tasks: dict[int, _Task] = {}
        self._slowest_s = math.inf
        """Seconds of the slowest row of the last call; the first call sends each row alone."""
        self.progress: Callable[[], None] = lambda: None
        """Called after each row."""
        self._pool = self._start()
        self._check_rule()

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each {'prompt': str, 'response': str, 'fields': dict}, in the same order."""
        scores: dict[int, Score] = {}
        for _ in range(POOL_RESTARTS):
            rest = {i: item for i, item in enumerate(items) if i not in scores}
            if not rest:
                break
            if not self._pool.active:  # pebble's pool breaks when a worker dies between two rows
                self.close()
                self._pool = self._start()
            scores |= self._score_rows(rest)
        if scores:
            known = all(math.isfinite(score.seconds) for score in scores.values())
            self._slowest_s = max(score.seconds for score in scores.values()) if known else math.inf
        lost = Score(math.nan, Status.FAILED, math.nan, f"the pool of workers broke {POOL_RESTARTS} times")
        return [scores.get(i, lost) for i in range(len(items))]

    def needs(self) -> frozenset[str]:
        """Fields that every row needs: the rule's arguments without a default or a configured value."""
        return self._pool.schedule(needed_fields, (self._rule, self._kwargs)).result()

    def under_way(self) -> list[int]:
        """Indices of the items that a worker is scoring now. Thread-safe."""
        return [i for i, task in list(self._tasks.items()) if task.future.running()]

    def close(self) -> None:
        """Kill the workers. Idempotent."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> RulePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        start_tracker()
        return ProcessPool(
            self._workers, initializer=enter_worker, initargs=(self._rule, self._memory_bytes), context=WorkerContext()
        )

    def _check_rule(self) -> None:
        """Import and check the rule in a worker, because importing it may have any effect. Raises ValueError."""
        future = self._pool.schedule(rule_problem, (self._rule, self._kwargs, self._timeout_s, self._where))
        if self._settled(future, IMPORT_LIMIT_S):
            error = future.exception()
            problem = future.result() if error is None else f"{type(error).__name__} while it was imported"
        elif self._pool.active:
            problem = f"{self._where}.rule={self._rule!r} was not imported within {IMPORT_LIMIT_S:.0f} s."
        else:
            problem = f"{self._where}.rule={self._rule!r} ends the process that imports it."
        if problem is not None:
            self.close()
            raise ValueError(problem)

    def _settled(self, future: Future[Any], limit_s: float = math.inf) -> bool:
        """Wait for a future. False: the limit has passed, or the pool broke (pebble may leave futures pending forever)."""
        end = time.monotonic() + limit_s
        while not future.done() and self._pool.active and time.monotonic() < end:
            wait([future], timeout=0.5)
        return future.done() and not isinstance(future.exception(), BrokenProcessPool)

    def _score_rows(self, rows: Mapping[int, Mapping[str, Any]]) -> dict[int, Score]:
        """Scores by row; rows lost by a broken pool are missing."""
        self._tasks = {}
        try:
            for chunk in self._chunks(list(rows)):
                self._schedule(chunk, rows)
        except RuntimeError:  # the pool broke while rows were being submitted
            pass
        start, scores = time.monotonic(), {}
        for i in list(self._tasks):
            score = self._score_of(i, rows)
            if score is not None:
                scores[i] = score
            self.progress()
            all_timed_out = all(score.status is Status.TIMEOUT for score in scores.values())
            if all_timed_out and len(scores) >= 2 * self._workers and time.monotonic() - start > GIVE_UP_S:
                return self._give_up(scores)
        return scores

    def _chunks(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Rows that go to a worker together, if the slowest so far was fast enough; two chunks a worker at least."""
        fast = int(CHUNK_S / max(self._slowest_s, 1e-6))
        size = max(1, min(fast, -(-len(indices) // (2 * self._workers))))
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _schedule(self, chunk: Sequence[int], rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Send rows to a worker. The time limit holds for all of them together: where it passes, or the worker dies, each
        is sent again alone, and that counts."""
        sent = [(rows[i]["prompt"], rows[i]["response"], rows[i].get("fields", {})) for i in chunk]
        future = self._pool.schedule(score_rows, (self._rule, self._kwargs, sent), timeout=self._timeout_s)
        self._tasks |= {i: _Task(future, place, len(chunk) == 1) for place, i in enumerate(chunk)}

    def _send_alone(self, failed: Future[list[Score]], rows: Mapping[int, Mapping[str, Any]]) -> None:
        for i in [i for i, task in self._tasks.items() if task.future is failed]:
            self._schedule([i], rows)

    def _score_of(self, i: int, rows: Mapping[int, Mapping[str, Any]]) -> Score | None:
        """The row's score, retried if an external signal arrived while it was computed. None: the pool broke."""
        score = None
        for _ in range(SIGNAL_RETRIES):
            if not self._settled(self._tasks[i].future):
                return None
            try:
                if self._tasks[i].future.exception() is not None and not self._tasks[i].alone:
                    self._send_alone(self._tasks[i].future, rows)
                    if not self._settled(self._tasks[i].future):
                        return None
                score = self._outcome(self._tasks[i])
                if not score.disturbed:
                    break
                self._schedule([i], rows)
            except RuntimeError:
                return None
        return score

    def _give_up(self, scores: Mapping[int, Score]) -> dict[int, Score]:
        """Mark the remaining rows as timed out: trying them would take rows / workers * timeout_s."""
        rest = [i for i in self._tasks if i not in scores]
        for i in rest:
            self._tasks[i].future.cancel()
        detail = (
            f"not tried: the first {len(scores)} rows all had no score within {self._where}.timeout_s={self._timeout_s}"
        )
        return {**scores, **dict.fromkeys(rest, Score(math.nan, Status.TIMEOUT, math.nan, detail))}

    def _outcome(self, task: _Task) -> Score:
        try:
            score = task.future.result()[task.place]
        except TimeoutError:
            return self._timed_out(self._timeout_s)
        except ProcessExpired as error:
            return Score(math.nan, Status.FAILED, math.nan, f"the worker died: {_exit_text(error.exitcode)}")
        except Exception as error:  # the row could not be sent to a worker, or its score not sent back
            return Score(math.nan, Status.FAILED, math.nan, f"{type(error).__name__}: {error}")
        # pebble checks its clock only ten times a second; the row's own clock decides.
        return self._timed_out(score.seconds) if score.seconds > self._timeout_s else score

    def _timed_out(self, seconds: float) -> Score:
        return Score(math.nan, Status.TIMEOUT, seconds, f"no score within {self._where}.timeout_s={self._timeout_s}")


def _exit_text(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {0 if code == EXIT_ZERO else code}"
