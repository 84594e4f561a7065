"""Score responses by a rule in worker processes on host CPUs: a rule that hangs, dies or raises costs only its row."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from aligner.reward.signals import start_tracker
from aligner.reward.worker import (
    QUIET_EXIT,
    Score,
    Status,
    WorkerContext,
    enter_worker,
    needed_fields,
    rule_problem,
    score_row,
)

__all__ = ["RulePool", "Score", "Status"]

IMPORT_LIMIT_S = 120.0
POOL_LIVES = 3
TRIES = 3
"""Of a row that a signal from outside has disturbed; a rule may send itself one each time."""
HOPELESS_S = 30.0
"""After so many seconds of nothing but timeouts, from the first row of a call on, the rest of it is given up."""


class RulePool:
    """Worker processes that score rows by one rule. They see no GPU and import neither torch nor the job's program."""

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
            kwargs: arguments for every row; a row's own field of the same name comes first.
            workers: processes.
            timeout_s: limit for one row, in seconds; importing the rule is not counted.
            where: what stands before rule, kwargs, ... in messages.
            memory_bytes: of one worker; beyond it the row fails with MemoryError. None: no limit.

        Raises:
            ValueError: the rule cannot be imported or called so, or refuses these arguments; names reward.rule, ...
        """
        if workers < 1:
            raise ValueError(f"{where}.workers={workers} must be 1 or more.")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"{where}.timeout_s={timeout_s} must be a positive number of seconds.")
        self._where = where
        path, _, function = rule.rpartition(":")
        # A replacement worker starts later, when this process may stand in another folder.
        self._rule = f"{os.path.abspath(path)}:{function}" if path.endswith(".py") else rule
        self._kwargs = dict(kwargs or {})
        self._workers = workers
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._futures: dict[int, Future[Score]] = {}
        self.progress: Callable[[], None] = lambda: None
        """Called after each row."""
        self._pool = self._start()
        self._check_rule()

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each {'prompt': str, 'response': str, 'fields': dict}, in the same order."""
        scores: dict[int, Score] = {}
        for _ in range(POOL_LIVES):
            rest = {i: item for i, item in enumerate(items) if i not in scores}
            if not rest:
                break
            if not self._pool.active:  # pebble gives its pool up when a worker dies between two rows
                self.close()
                self._pool = self._start()
            scores |= self._score_rows(rest)
        lost = Score(math.nan, Status.FAILED, math.nan, f"the pool of workers broke {POOL_LIVES} times")
        return [scores.get(i, lost) for i in range(len(items))]

    def needs(self) -> frozenset[str]:
        """Fields without which a row has no score: the rule's arguments that have neither a default nor a kwarg."""
        return self._pool.schedule(needed_fields, (self._rule, self._kwargs)).result()

    def under_way(self) -> list[int]:
        """Items that a worker has, whoever asks."""
        return [i for i, future in list(self._futures.items()) if future.running()]

    def close(self) -> None:
        """End the workers, whatever they do. May be called again."""
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
        """In a worker, since only there does the import happen, and a rule's import may do anything."""
        future = self._pool.schedule(rule_problem, (self._rule, self._kwargs, self._timeout_s, self._where))
        if self._settled(future, IMPORT_LIMIT_S):
            error = future.exception()
            problem = future.result() if error is None else f"{type(error).__name__} while it is imported"
        elif self._pool.active:
            problem = f"{self._where}.rule={self._rule!r} is not imported within {IMPORT_LIMIT_S:.0f} s."
        else:
            problem = f"{self._where}.rule={self._rule!r} ends the process that imports it."
        if problem is not None:
            self.close()
            raise ValueError(problem)

    def _settled(self, future: Future[Any], limit_s: float = math.inf) -> bool:
        """Wait for it. False: the pool broke, and pebble may leave it pending for ever; or the limit has passed."""
        end = time.monotonic() + limit_s
        while not future.done() and self._pool.active and time.monotonic() < end:
            wait([future], timeout=0.5)
        return future.done() and not isinstance(future.exception(), BrokenProcessPool)

    def _score_rows(self, rows: Mapping[int, Mapping[str, Any]]) -> dict[int, Score]:
        """Scores by row; rows that a broken pool has swallowed are missing."""
        futures = self._futures = {}
        try:
            for i, row in rows.items():
                futures[i] = self._schedule(row)
        except RuntimeError:  # the pool broke while rows were handed in
            pass
        start, found = time.monotonic(), {}
        for i in futures:
            score = self._undisturbed(i, rows[i])
            if score is not None:
                found[i] = score
            self.progress()
            late = all(score.status is Status.TIMEOUT for score in found.values())
            if late and len(found) >= 2 * self._workers and time.monotonic() - start > HOPELESS_S:
                return self._give_up(futures, found)
        return found

    def _schedule(self, row: Mapping[str, Any]) -> Future[Score]:
        arguments = (self._rule, self._kwargs, row["prompt"], row["response"], row.get("fields", {}))
        return self._pool.schedule(score_row, arguments, timeout=self._timeout_s)

    def _undisturbed(self, i: int, row: Mapping[str, Any]) -> Score | None:
        """The row's score, asked for again where a signal to the whole job may have had a part in it. None: the pool broke."""
        score = None
        for _ in range(TRIES):
            if not self._settled(self._futures[i]):
                return None
            score = self._outcome(self._futures[i])
            if not score.disturbed:
                break
            try:
                self._futures[i] = self._schedule(row)
            except RuntimeError:
                return None
        return score

    def _give_up(self, futures: Mapping[int, Future[Score]], found: Mapping[int, Score]) -> dict[int, Score]:
        """The rest would take rows / workers * timeout_s to say the same."""
        rest = [i for i in futures if i not in found]
        for i in rest:
            futures[i].cancel()
        detail = (
            f"not tried: the first {len(found)} rows all had no score within {self._where}.timeout_s={self._timeout_s}"
        )
        return {**found, **dict.fromkeys(rest, Score(math.nan, Status.TIMEOUT, math.nan, detail))}

    def _outcome(self, future: Future[Score]) -> Score:
        try:
            score = future.result()
        except TimeoutError:
            return self._timed_out(self._timeout_s)
        except ProcessExpired as error:
            return Score(math.nan, Status.FAILED, math.nan, f"the worker died: {_exit_text(error.exitcode)}")
        except Exception as error:  # the row could not be sent to a worker, or its score not sent back
            return Score(math.nan, Status.FAILED, math.nan, f"{type(error).__name__}: {error}")
        # pebble looks at its clock ten times a second; the row's own clock decides.
        return self._timed_out(score.seconds) if score.seconds > self._timeout_s else score

    def _timed_out(self, seconds: float) -> Score:
        return Score(math.nan, Status.TIMEOUT, seconds, f"no score within {self._where}.timeout_s={self._timeout_s}")


def _exit_text(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {0 if code == QUIET_EXIT else code}"
