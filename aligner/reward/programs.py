"""Rules that run the program in a response against tests, in a sandbox."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from aligner.reward.code_blocks import BLOCKS, python_block
from aligner.reward.rules import checked_by
from aligner.reward.sandbox import ISOLATION, Limits, isolation_problem, run_python
from aligner.reward.sandboxed.checks import NEAR
from aligner.reward.suites import Suite, read_suite

__all__ = ["code_tests", "python_block", "same_output"]


SANDBOXED = Path(__file__).with_name("sandboxed")
JUDGING = ("harness.py", "checks.py", "remote.py", "wire.py")
SERVING = ("served.py", "wire.py")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
INTEGER = re.compile(r"[-+]?\d+")
OVERHEAD_S = 1.0
LIMITS = tuple(entry.name for entry in fields(Limits) if entry.name != "seconds")


def _check(kwargs: Mapping[str, Any], timeout_s: float) -> str | None:
    isolation = kwargs.get("isolation", ISOLATION[0])
    if isolation not in ISOLATION:
        return f"kwargs.isolation={isolation} is unknown; use {' or '.join(ISOLATION)}."
    if kwargs.get("block", BLOCKS[0]) not in BLOCKS:
        return f"kwargs.block={kwargs['block']} is unknown; use {', '.join(BLOCKS[:-1])} or {BLOCKS[-1]}."
    for name in ("seconds", *LIMITS):
        value = kwargs.get(name, getattr(Limits, name))
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            return f"kwargs.{name}={value} must be a positive number."
        if name != "seconds" and not isinstance(value, int):
            return f"kwargs.{name}={value} must be a whole number."
    seconds = kwargs.get("seconds", Limits.seconds)
    if seconds + OVERHEAD_S > timeout_s:
        return (
            f"timeout_s={timeout_s} is less than kwargs.seconds={seconds} plus {OVERHEAD_S:.0f} s to start and end, so a slow "
            f"program would get no reward instead of 0; use {seconds + OVERHEAD_S} or more."
        )
    problem = isolation_problem(isolation)
    if problem is None:
        return None
    if isolation == "limits":
        return f"kwargs.isolation=limits does not work here ({problem})."
    return (
        f"kwargs.isolation=namespaces is not possible here ({problem}). Allow user namespaces "
        "(kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, a container that permits them), "
        "or set kwargs.isolation=limits, where programs can reach the network and whatever this user can read or write."
    )


# settings: a row of the data cannot set them
@checked_by(_check, "partial", "block", "seconds", "isolation", *LIMITS)
def code_tests(
    prompt: str,
    response: str,
    *,
    tests: Any = None,
    test: Any = None,
    test_list: Any = None,
    test_cases: Any = None,
    input_output: Any = None,
    ground_truth: Any = None,
    entry_point: Any = None,
    fn_name: Any = None,
    test_setup_code: Any = None,
    test_imports: Any = None,
    metadata: Any = None,
    partial: bool = False,
    block: str = BLOCKS[0],
    seconds: float = Limits.seconds,
    isolation: str = ISOLATION[0],
    memory_mb: int = Limits.memory_mb,
    processes: int = Limits.processes,
    file_mb: int = Limits.file_mb,
    output_kb: int = Limits.output_kb,
) -> float:
    """1 if the response's program passes all tests of the row, else 0. A response without a program gets 0.

    The tests are the first of `tests`, `test`, `test_list`, `test_cases`, `input_output`, `ground_truth` that the row
    has, in any format listed in `suites.py`, or JSON text of it:

        "assert f(2) == 4"                            Python tests (see `python_tests.py`): asserts, HumanEval's
                                                      check(candidate), pytest functions and classes, unittest
        {"input": "2\\n", "output": "4\\n"}           the program gets this standard input, must exit with code 0 and
                                                      print this output (see `same_output`)
        the same with a function name                 its arguments and its result

    Tests of functions run in one sandbox, the program in another, connected by a socket: calls are forwarded, and results
    are compared on the tests' side. So exiting early, printing, patching builtins, inspecting the interpreter or
    returning an object that equals everything cannot pass a test. Objects of the program's own classes stay on its side
    and are operated on there.

    See `sandbox.run_python` for what a program can do in the sandbox. Exceeding time, memory or output limits fails the
    test; a sandbox that cannot be created makes the row FAILED (no reward), not 0.

    Args:
        entry_point, fn_name: the tested function, or Solution().method.
        test_setup_code, test_imports: Python that runs before both the program and the tests.
        metadata: LiveCodeBench's metadata, which names the function.
        partial: return the fraction of tests passed instead of all or nothing.
        block: which code block is the program: last, first, all, or text; see `code_blocks.python_block`.
        seconds: time limit for all tests of a row together; less than timeout_s.
        isolation: namespaces; or limits, where those are not available and the programs are trusted.
        memory_mb, processes, file_mb, output_kb: see `sandbox.Limits`.

    Raises:
        ValueError: tests that cannot be parsed, that cannot fail, or that fail by themselves.
        SandboxError: the sandbox could not be set up.
    """
    candidates = (tests, test, test_list, test_cases, input_output, ground_truth)
    row_tests = next((candidate for candidate in candidates if candidate is not None), None)
    prefix = prompt if _compiles(prompt) else python_block(prompt) or ""
    suite = read_suite(row_tests, entry_point or fn_name, (test_imports or (), test_setup_code or ()), metadata, prefix)
    code = python_block(response, block)
    if code is None:
        return 0.0
    deadline = _Deadline(Limits(seconds, memory_mb, processes, file_mb, output_kb))
    return _share_passed(code, suite, prefix, partial, deadline, isolation)


class _Deadline:
    """Limits of all sandboxes of one row: they share its seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._end = limits, time.monotonic() + limits.seconds

    def passed(self) -> bool:
        return time.monotonic() >= self._end

    def remaining(self) -> Limits:
        """The limits of a sandbox that starts now."""
        return replace(self._limits, seconds=max(0.01, self._end - time.monotonic()))


def _share_passed(code: str, suite: Suite, prefix: str, partial: bool, deadline: _Deadline, isolation: str) -> float:
    """The fraction of tests passed, or without `partial` 1 if all of them are, else 0: then the first failure ends it."""
    functions = len(suite.calls) + len(suite.scripts.tests)
    passed = 0
    if functions:
        passed = _passed(_completed(code, suite, prefix), suite, partial, deadline.remaining(), isolation)
    for given_text, expected in suite.pairs:
        if (passed < functions and not partial) or deadline.passed():
            break
        correct = _prints(code, given_text, expected, deadline.remaining(), isolation)
        if not correct and not partial:
            return 0.0
        passed += correct
    total = functions + len(suite.pairs)
    return passed / total if partial else float(passed == total)


def _prints(code: str, given_text: str, expected: str, limits: Limits, isolation: str) -> bool:
    """Whether the program, given this standard input, exits with code 0 and prints the expected output."""
    outcome = run_python(["response.py"], {"response.py": code}, given_text.encode(), limits, isolation)
    printed = outcome.stdout.decode("utf-8", "replace")
    return outcome.code == 0 and not outcome.stopped and same_output(printed, expected)


def same_output(printed: str, expected: str) -> bool:
    """Compare outputs line by line, ignoring whitespace around lines and around the whole. Words that differ are equal if
    they are numbers, not both integers, within numpy.allclose's tolerance (as the evaluators of APPS, PRIME and
    LiveCodeBench compare, except that no line is compared as a set of words)."""
    lines, expected_lines = ([line.strip() for line in text.strip().splitlines()] for text in (printed, expected))
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(line: str, expected: str) -> bool:
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_same_word, words, expected_words))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not (NUMBER.fullmatch(word) and NUMBER.fullmatch(expected)) or (
        INTEGER.fullmatch(word) and INTEGER.fullmatch(expected)
    ):
        return False
    return math.isclose(float(word), float(expected), **NEAR)


def _completed(code: str, suite: Suite, prefix: str) -> str:
    """The program, appended to the prompt if it is only a function body (HumanEval)."""
    if prefix in suite.setup and not _compiles(code):
        return f"{prefix.rstrip()}\n{code}"
    return code


def _compiles(code: str) -> bool:
    try:
        compile(code, "response.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _passed(code: str, suite: Suite, partial: bool, limits: Limits, isolation: str) -> int:
    """Number of function tests passed, with the tests in one sandbox and the program in another."""
    plan = json.dumps(suite.plan(partial)).encode()
    program = json.dumps({"setup": suite.setup, "pieces": suite.scripts.pieces, "code": code}).encode()
    tests_socket, program_socket = socket.socketpair()

    def serve() -> None:
        with program_socket:  # closed at the end, so that the tests notice the end of the program
            files = {name: _sandboxed_source(name) for name in SERVING}
            run_python(
                ["served.py", str(program_socket.fileno())],
                files,
                program,
                limits,
                isolation,
                [program_socket.fileno()],
            )

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(serve)
        with tests_socket:  # and the program the end of the tests
            files = {name: _sandboxed_source(name) for name in JUDGING}
            outcome = run_python(
                ["harness.py", str(tests_socket.fileno())], files, plan, limits, isolation, [tests_socket.fileno()]
            )
        serving.result()
    reports = [json.loads(line) for line in outcome.stdout.decode().splitlines()]
    broken = next((entry["broken"] for entry in reports if isinstance(entry, dict)), None)
    if broken is None and not outcome.stopped and "done" not in reports and outcome.code >= 0:
        broken = f"the tests end their own process, with code {outcome.code}"
    if broken is not None:
        raise ValueError(f"no verdict: {broken}")
    return sum(isinstance(entry, int) for entry in reports)


@lru_cache
def _sandboxed_source(name: str) -> str:
    return (SANDBOXED / name).read_text(encoding="utf-8")
