"""Rules that run the program in a response, locked in a sandbox, never in a process of ours."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from aligner.reward.code_blocks import BLOCKS, python_block
from aligner.reward.rules import checked_by
from aligner.reward.sandbox import ISOLATION, Limits, isolation_problem, run_python
from aligner.reward.sandboxed.checks import NEAR
from aligner.reward.suites import Suite, read_suite

__all__ = ["code_tests", "python_block", "same_output"]


BOXED = Path(__file__).with_name("sandboxed")
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
            f"timeout_s={timeout_s} is no more than kwargs.seconds={seconds} with {OVERHEAD_S:.0f} s to start and end, so a "
            f"slow program would be a missing reward and not a wrong one; use {seconds + OVERHEAD_S} or more."
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


@checked_by(_check, "partial", "block", "seconds", "isolation", *LIMITS)  # never by a row of somebody's data set
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
    """1 if the response's program passes every test of the row, else 0; no program is a wrong answer: 0.

    The tests are the first of `tests`, `test`, `test_list`, `test_cases`, `input_output`, `ground_truth` that the row
    has, in any form that `suites.py` lists, JSON text of it too:

        "assert f(2) == 4"                            Python; `python_tests.py` says what is a test: asserts, HumanEval's
                                                      check(candidate), pytest's functions and classes, unittest
        {"input": "2\\n", "output": "4\\n"}           the program runs on this standard input, ends with code 0 and
                                                      prints this (see `same_output`)
        the same with a function's name               its arguments and its result

    Tests of a function run in a sandbox of their own; the program is in another and is only asked for what they call.
    Values go over, and are compared where the program is not: leaving early, printing, changing builtins, searching
    the interpreter or returning an object that equals everything passes nothing. Objects of the program's own classes
    stay there and answer for themselves, among each other.

    What a program can and cannot do in the sandbox stands at `sandbox.run_python`. Time, memory, or output beyond the
    limits is a failed test; a sandbox that cannot be made is a failed row, not a 0.

    Args:
        entry_point, fn_name: the function that the tests are about, or Solution().method.
        test_setup_code, test_imports: Python that runs before both the program and the tests.
        metadata: LiveCodeBench's, which names the function.
        partial: the fraction of tests passed in place of all or nothing.
        block: which code block is the program: last, first, all, or text; see `code_blocks.python_block`.
        seconds: for all tests of a row together; below the row's limit (timeout_s).
        isolation: namespaces, or limits where these are not allowed and the programs are trusted.
        memory_mb, processes, file_mb, output_kb: see `sandbox.Limits`.

    Raises:
        ValueError: tests that are not understood, that nothing could fail, or that fail by themselves.
        SandboxError: the program could not be locked in.
    """
    given = (tests, test, test_list, test_cases, input_output, ground_truth)
    first = next((found for found in given if found is not None), None)
    prefix = prompt if _compiles(prompt) else python_block(prompt) or ""
    suite = read_suite(first, entry_point or fn_name, (test_imports or (), test_setup_code or ()), metadata, prefix)
    code = python_block(response, block)
    if code is None:
        return 0.0
    end = time.monotonic() + seconds

    def left() -> Limits:
        return Limits(max(0.01, end - time.monotonic()), memory_mb, processes, file_mb, output_kb)

    judged = len(suite.calls) + len(suite.scripts.tests)
    passed = _passed(_completed(code, suite, prefix), suite, partial, left(), isolation) if judged else 0
    for given_text, wanted in suite.pairs:
        if (passed < judged and not partial) or time.monotonic() >= end:
            break
        outcome = run_python(["response.py"], {"response.py": code}, given_text.encode(), left(), isolation)
        printed = outcome.stdout.decode("utf-8", "replace")
        right = outcome.code == 0 and not outcome.stopped and same_output(printed, wanted)
        if not right and not partial:
            return 0.0
        passed += right
    total = judged + len(suite.pairs)
    return passed / total if partial else float(passed == total)


def same_output(printed: str, wanted: str) -> bool:
    """Line by line, blanks around lines and around the whole aside; where words differ, numbers that are not both whole
    are equal as numpy.allclose has it (as the evaluators of APPS, PRIME and LiveCodeBench compare, but no line is
    ever compared as a set of words)."""
    lines, right = ([line.strip() for line in text.strip().splitlines()] for text in (printed, wanted))
    return len(lines) == len(right) and all(map(_same_line, lines, right))


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    words, right = line.split(), wanted.split()
    return len(words) == len(right) and all(map(_same_word, words, right))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not (NUMBER.fullmatch(word) and NUMBER.fullmatch(wanted)) or (
        INTEGER.fullmatch(word) and INTEGER.fullmatch(wanted)
    ):
        return False
    return math.isclose(float(word), float(wanted), **NEAR)


def _completed(code: str, suite: Suite, prefix: str) -> str:
    """A function's body alone goes on where the prompt ends (HumanEval)."""
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
    """How many tests of functions pass, with the tests in one sandbox and the program in another."""
    plan = json.dumps(suite.plan(partial)).encode()
    program = json.dumps({"setup": suite.setup, "pieces": suite.scripts.pieces, "code": code}).encode()
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:  # so that the tests see the end of the program
            files = {name: _boxed(name) for name in SERVING}
            run_python(["served.py", str(theirs.fileno())], files, program, limits, isolation, [theirs.fileno()])

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(serve)
        with ours:  # and the program that of the tests
            files = {name: _boxed(name) for name in JUDGING}
            outcome = run_python(["harness.py", str(ours.fileno())], files, plan, limits, isolation, [ours.fileno()])
        serving.result()
    said = [json.loads(line) for line in outcome.stdout.decode().splitlines()]
    broken = next((entry["broken"] for entry in said if isinstance(entry, dict)), None)
    if broken is None and not outcome.stopped and "done" not in said and outcome.code >= 0:
        broken = f"the tests end their own process, with code {outcome.code}"
    if broken is not None:
        raise ValueError(f"no verdict: {broken}")
    return sum(isinstance(entry, int) for entry in said)


@lru_cache
def _boxed(name: str) -> str:
    return (BOXED / name).read_text(encoding="utf-8")
