"""The worker processes of `RulePool`: how they start, load the rule, and score one row."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import multiprocessing
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from multiprocessing import context
from numbers import Real
from types import ModuleType
from typing import Any

from aligner.reward.rules import CHECK, SETTINGS, Unparsable, load_rule
from aligner.reward.signals import SignalCounter, signals_blocked
from aligner.reward.supervised_process import SupervisedPopen

EXIT_ZERO = 256
"""Stands for a worker's exit code 0; not a possible exit code of a process."""
DETAIL_CHARACTERS = 300


class Status(IntEnum):
    """Outcome of scoring one row."""

    OK = 0
    """The rule returned a finite number."""
    FAILED = 1
    """The rule raised, returned something else, or crashed its worker."""
    TIMEOUT = 2
    """The rule exceeded its time limit."""
    UNPARSABLE = 3
    """The rule raised `Unparsable`."""


@dataclass(frozen=True)
class Score:
    """Result of scoring one row."""

    value: float
    """The reward; NaN unless `status` is OK."""
    status: Status
    seconds: float
    """Time spent in the rule; NaN if its worker died."""
    detail: str = ""
    """Error text, if any."""
    disturbed: bool = False
    """An external signal arrived meanwhile; programs started by the rule may have died of it."""


def enter_worker(rule: str, memory_bytes: int | None = None) -> None:
    """Initialise a worker, before its first row.

    Args:
        rule: see `load_rule`; imported here.
        memory_bytes: limit of the private memory of this process and of each that it starts; beyond it Python raises
            MemoryError.
    """
    _signal_counter()
    if memory_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(ValueError):  # reported by rule_problem, or by the row
        _loaded(rule)  # here, so that the import does not count against the first row


def _die_with_parent() -> None:
    """Exit when the parent ends; a worker in an endless loop would otherwise outlive a killed job."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _signal_counter() -> SignalCounter:
    """The signal counter of this process; created once, on its main thread."""
    return SignalCounter()


@lru_cache(maxsize=1)
def _loaded(rule: str) -> tuple[Callable[..., Any], frozenset[str] | None, frozenset[str]]:
    """(function, names of its arguments or None for any, names taken by prompt and response)."""
    function = load_rule(rule)
    parameters = list(inspect.signature(function).parameters.values())
    filled = frozenset({"prompt", "response"} | {parameter.name for parameter in parameters[:2]})
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function, None, filled
    return function, frozenset(parameter.name for parameter in parameters[2:]), filled


def rule_problem(rule: str, kwargs: Mapping[str, Any], timeout_s: float, where: str) -> str | None:
    """Error message if reward.rule, reward.kwargs or reward.timeout_s do not work together, else None.

    Args:
        where: prefix of the settings in the message.
    """
    try:
        function = _loaded(rule)[0]
        signature = inspect.signature(function)
    except ValueError as error:
        return str(error).replace("reward.rule=", f"{where}.rule=", 1)
    form = _form_problem(function)
    if form:
        return f"{where}.rule={rule!r} {form}; give a function fn(prompt, response, **fields) -> float."
    try:
        signature.bind_partial("", "")
    except TypeError as error:
        return f"{where}.rule={rule!r} must take (prompt, response, **fields): {error}."
    _, names, filled = _loaded(rule)
    for key in kwargs:
        if key in filled:
            return f"{where}.kwargs.{key}: prompt and response come from the rows; remove it."
        if names is not None and key not in names:
            has = ", ".join(sorted(names)) or "none"
            return f"{where}.kwargs.{key}: {where}.rule={rule!r} has no such argument; it has {has}."
    check = getattr(function, CHECK, None)
    problem = check(kwargs, timeout_s) if check else None
    return f"{where}.{problem}" if problem else None


def _form_problem(function: Callable[..., Any]) -> str | None:
    """Why calling it cannot return a number (a class, a coroutine or a generator), or None."""
    called = function.func if isinstance(function, functools.partial) else function
    if inspect.isclass(called):
        return "is a class, and calling it makes an object, not a number"
    candidates = [called, called.__class__.__call__]  # or an instance with __call__
    if any(map(inspect.iscoroutinefunction, candidates)) or any(map(inspect.isasyncgenfunction, candidates)):
        return "is async, and calling it gives a coroutine, not a number"
    if any(map(inspect.isgeneratorfunction, candidates)):
        return "yields, and calling it gives a generator, not a number"
    return None


def needed_fields(rule: str, kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Fields that every row must have: the rule's arguments without a default or a configured value."""
    function, _, filled = _loaded(rule)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in variadic}
    return frozenset(needed - filled - kwargs.keys())


def score_row(rule: str, kwargs: Mapping[str, Any], prompt: str, response: str, fields: Mapping[str, Any]) -> Score:
    """Call the rule on one row; anything it raises becomes a `Score` without a value."""
    start, signals = time.perf_counter(), _signal_counter().count
    value, status, detail = math.nan, Status.FAILED, ""
    try:
        function, names, filled = _loaded(rule)
        settings: frozenset[str] = getattr(function, SETTINGS, frozenset())
        arguments = {**kwargs, **{k: v for k, v in fields.items() if k not in settings}}
        accepted = {k: v for k, v in arguments.items() if k not in filled and (names is None or k in names)}
        start = time.perf_counter()
        value, status, detail = _verdict(function(prompt, response, **accepted))
    except Unparsable as error:
        status, detail = Status.UNPARSABLE, str(error)
    except BaseException as error:  # also SystemExit: a rule must not end its worker
        detail = _error_text(error)
    seconds, disturbed = time.perf_counter() - start, _signal_counter().count > signals
    return Score(value, status, seconds, detail[:DETAIL_CHARACTERS], disturbed)


def score_rows(rule: str, kwargs: Mapping[str, Any], rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Score]:
    """`score_row` of several rows: (prompt, response, fields)."""
    return [score_row(rule, kwargs, *row) for row in rows]


def _verdict(returned: Any) -> tuple[float, Status, str]:
    if not isinstance(returned, Real):
        kind = type(returned).__name__
        return math.nan, Status.FAILED, f"the rule returned {repr(returned)[:80]} ({kind}), not a number"
    value = float(returned)
    if not math.isfinite(value):
        return math.nan, Status.FAILED, f"the rule returned {value}"
    return value, Status.OK, ""


def _error_text(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error) or ("more than reward.memory_mib allows a worker" if isinstance(error, MemoryError) else "")
    return f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {message}"


class _Start(SupervisedPopen):
    """Spawns without importing the parent's `__main__`, which is the whole job with torch and vLLM."""

    _one_at_a_time = threading.Lock()

    def _launch(self, process_obj: Any) -> None:
        with self._one_at_a_time, signals_blocked():
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                sys.modules["__main__"] = main


class Worker(context.SpawnProcess):
    """A spawned process for pebble's pool."""

    @property
    def exitcode(self) -> int | None:
        """EXIT_ZERO for 0: pebble does not notice a worker that exits with 0, and its row would wait for the time limit."""
        code = super().exitcode
        return EXIT_ZERO if code == 0 else code

    def terminate(self) -> None:
        """Kill: workers ignore SIGTERM, which may come from a scheduler."""
        self.kill()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Start(process_obj)


class WorkerContext(context.SpawnContext):
    """The multiprocessing context that makes `Worker`s."""

    Process = Worker
