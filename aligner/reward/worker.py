"""What a worker process of the rule pool is: how it starts, loads the rule, and scores one row."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from multiprocessing import context
from numbers import Real
from types import ModuleType
from typing import Any

from aligner.reward.rules import CHECK, SETTINGS, Unparsable, load_rule
from aligner.reward.signals import Outlived, held_back
from aligner.reward.supervised_process import KeptPopen

QUIET_EXIT = 256
"""Stands for exit code 0 of a worker, outside the codes that a process can have."""
DETAIL_CHARACTERS = 300


class Status(IntEnum):
    """What became of one row."""

    OK = 0
    """The rule returned a finite number."""
    FAILED = 1
    """The rule raised, returned something else, or took its worker down."""
    TIMEOUT = 2
    """The rule ran into its time limit."""
    UNPARSABLE = 3
    """The rule raised `Unparsable`."""


@dataclass(frozen=True)
class Score:
    """The rule's verdict on one row."""

    value: float
    """The reward; NaN unless `status` is OK, so that it cannot pass for a zero."""
    status: Status
    seconds: float
    """Spent in the rule; NaN if its worker died."""
    detail: str = ""
    """What went wrong."""
    disturbed: bool = False
    """A signal from outside came meanwhile: programs that the rule had started may have died of it."""


def enter_worker(rule: str, memory_bytes: int | None = None) -> None:
    """Once in each worker, before its first row.

    Args:
        memory_bytes: private memory of this process and of each that it starts; beyond it Python raises MemoryError.
    """
    _outlived()
    if memory_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(ValueError):  # told by rule_problem, or by the row
        _loaded(rule)  # here, so that the import does not count against the first row


def _die_with_parent() -> None:
    """A worker in an endless loop would outlive a job that was killed, and burn a core for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _outlived() -> Outlived:
    """This process's; set up once, on its main thread."""
    return Outlived()


@lru_cache(maxsize=1)
def _loaded(rule: str) -> tuple[Callable[..., Any], frozenset[str] | None, frozenset[str]]:
    """(function, names that it takes or None for any, names that prompt and response already fill)."""
    function = load_rule(rule)
    parameters = list(inspect.signature(function).parameters.values())
    filled = frozenset({"prompt", "response"} | {parameter.name for parameter in parameters[:2]})
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function, None, filled
    return function, frozenset(parameter.name for parameter in parameters[2:]), filled


def rule_problem(rule: str, kwargs: Mapping[str, Any], timeout_s: float, where: str) -> str | None:
    """What is wrong with reward.rule, reward.kwargs or reward.timeout_s for it, if anything."""
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
            return f"{where}.kwargs.{key}: the rule gets its prompt and response from the rows; leave it out."
        if names is not None and key not in names:
            has = ", ".join(sorted(names)) or "none"
            return f"{where}.kwargs.{key}: {where}.rule={rule!r} has no such argument; it has {has}."
    check = getattr(function, CHECK, None)
    problem = check(kwargs, timeout_s) if check else None
    return f"{where}.{problem}" if problem else None


def _form_problem(function: Callable[..., Any]) -> str | None:
    """Why calling it gives no number, as far as its form tells."""
    called = function.func if isinstance(function, functools.partial) else function
    if inspect.isclass(called):
        return "is a class, and calling it makes an object, not a number"
    candidates = [called, called.__class__.__call__]  # or an instance whose class is called
    if any(map(inspect.iscoroutinefunction, candidates)) or any(map(inspect.isasyncgenfunction, candidates)):
        return "is async, and calling it gives a coroutine, not a number"
    if any(map(inspect.isgeneratorfunction, candidates)):
        return "yields, and calling it gives a generator, not a number"
    return None


def needed_fields(rule: str, kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the fields that every row must have, since the rule has neither a default nor a configured value for them."""
    function, _, filled = _loaded(rule)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in variadic}
    return frozenset(needed - filled - kwargs.keys())


def score_row(rule: str, kwargs: Mapping[str, Any], prompt: str, response: str, fields: Mapping[str, Any]) -> Score:
    """Call the rule on one row; whatever it does short of ending the process becomes a score."""
    start, signals = time.perf_counter(), _outlived().count
    value, status, detail = math.nan, Status.FAILED, ""
    try:
        function, names, filled = _loaded(rule)
        settings: frozenset[str] = getattr(function, SETTINGS, frozenset())
        given = {**kwargs, **{k: v for k, v in fields.items() if k not in settings}}
        wanted = {k: v for k, v in given.items() if k not in filled and (names is None or k in names)}
        start = time.perf_counter()
        value, status, detail = _verdict(function(prompt, response, **wanted))
    except Unparsable as error:
        status, detail = Status.UNPARSABLE, str(error)
    except BaseException as error:  # also SystemExit: a rule must not end its worker
        detail = _error_text(error)
    seconds, disturbed = time.perf_counter() - start, _outlived().count > signals
    return Score(value, status, seconds, detail[:DETAIL_CHARACTERS], disturbed)


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
    said = str(error) or ("more than reward.memory_mib allows a worker" if isinstance(error, MemoryError) else "")
    return f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {said}"


class _Start(KeptPopen):
    """Spawns without importing the parent's `__main__`: that is the whole job, with torch and vLLM."""

    _one_at_a_time = threading.Lock()

    def _launch(self, process_obj: Any) -> None:
        with self._one_at_a_time, held_back():
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
        """pebble overlooks a worker that ends by exit code 0, and its row would wait for its time limit."""
        code = super().exitcode
        return QUIET_EXIT if code == 0 else code

    def terminate(self) -> None:
        """It outlives SIGTERM, which may come from a scheduler; its rank ends it for good."""
        self.kill()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Start(process_obj)


class WorkerContext(context.SpawnContext):
    """The multiprocessing context that makes `Worker`s."""

    Process = Worker
