"""Rules that run the program in a response, locked in a sandbox, never in a process of ours."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from aligner.reward.rules import checked_by
from aligner.reward.sandbox import ISOLATION, Limits, isolation_problem, run_python

BLOCK = re.compile(
    r"^[ \t]*```(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
DRIVER = """
import json, os, sys
given = json.load(sys.stdin)
report = os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDWR), 0)
os.dup2(0, 1)
names = {"__name__": "__main__"}
exec(compile(given["code"], "response.py", "exec"), names)
for number, test in enumerate(given["tests"]):
    try:
        exec(compile(test, "test.py", "exec"), names)
    except Exception:
        continue
    os.write(report, f"{given['mark']}{number}\\n".encode())
"""
"""Runs the response's top level, then each test in its names; a mark that the response was not told says: passed."""
OVERHEAD_S = 1.0
LIMITS = tuple(entry.name for entry in fields(Limits) if entry.name != "seconds")


def _check(kwargs: Mapping[str, Any], timeout_s: float) -> str | None:
    isolation = kwargs.get("isolation", ISOLATION[0])
    if isolation not in ISOLATION:
        return f"kwargs.isolation={isolation} is unknown; use {' or '.join(ISOLATION)}."
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


@checked_by(_check, "partial", "seconds", "isolation", *LIMITS)  # never by a row of somebody's data set
def code_tests(
    prompt: str,
    response: str,
    *,
    tests: Sequence[Any] | str,
    partial: bool = False,
    seconds: float = Limits.seconds,
    isolation: str = ISOLATION[0],
    memory_mb: int = Limits.memory_mb,
    processes: int = Limits.processes,
    file_mb: int = Limits.file_mb,
    output_kb: int = Limits.output_kb,
) -> float:
    """1 if the response's last Python code block passes every test, else 0; no block is a wrong answer: 0.

    Two kinds of tests may be mixed in `tests` (one text is a list of one):
        "assert f(2) == 4"                            runs after the block, among its names; passes unless it raises
        {"input": "2\\n", "output": "4\\n"}           the block runs on this standard input and ends with code 0, and
                                                      prints this, blanks at line ends and empty last lines aside

    Outputs are compared outside the sandbox. A test of the first kind runs in the response's own process, as it must to
    see its names: leaving early or raising is no way round it, but a response that sets out to search the interpreter
    for the marks of passed tests could forge them. Where that matters, use the second kind.

    What a program can and cannot do in the sandbox stands at `sandbox.run_python`. Time, memory, or output beyond the
    limits is a failed test; a sandbox that cannot be made is a failed row, not a 0.

    Args:
        partial: the fraction of tests passed in place of all or nothing.
        seconds: for all tests of a row together; below the row's limit (timeout_s).
        isolation: namespaces, or limits where these are not allowed and the programs are trusted.
        memory_mb, processes, file_mb, output_kb: see `sandbox.Limits`.

    Raises:
        ValueError: tests that cannot be read.
        SandboxError: the program could not be locked in.
    """
    asserts, pairs = _sorted_out([tests] if isinstance(tests, str) else tests)
    code = python_block(response)
    if code is None:
        return 0.0
    end = time.monotonic() + seconds

    def left() -> Limits:
        return Limits(max(0.01, end - time.monotonic()), memory_mb, processes, file_mb, output_kb)

    passed = _passed_asserts(code, asserts, left(), isolation) if asserts else 0
    for given, wanted in pairs:
        if passed < len(asserts) and not partial:
            break
        if time.monotonic() >= end:
            break
        outcome = run_python(["response.py"], {"response.py": code}, given.encode(), left(), isolation)
        right = (
            outcome.code == 0 and not outcome.stopped and _lines(outcome.stdout.decode("utf-8", "replace")) == wanted
        )
        if not right and not partial:
            return 0.0
        passed += right
    total = len(asserts) + len(pairs)
    return passed / total if partial else float(passed == total)


def python_block(response: str) -> str | None:
    """The last fenced block of Python (or of no named language); None where there is none."""
    blocks = BLOCK.findall(response)
    return blocks[-1] if blocks else None


def _sorted_out(tests: Sequence[Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(asserts, (input, lines of output))."""
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError(f"tests={tests!r} must be a list of at least one test")
    asserts, pairs = [], []
    for test in tests:
        if isinstance(test, str):
            asserts.append(test)
        elif isinstance(test, Mapping) and isinstance(test.get("output"), str):
            pairs.append((str(test.get("input", "")), _lines(test["output"])))
        else:
            raise ValueError(f'a test must be text or {{"input": text, "output": text}}, not {str(test)[:80]}')
    return asserts, pairs


def _passed_asserts(code: str, asserts: list[str], limits: Limits, isolation: str) -> int:
    mark = secrets.token_hex(16)
    given = json.dumps({"code": code, "tests": asserts, "mark": mark}).encode()
    outcome = run_python(["-c", DRIVER], {}, given, limits, isolation)
    said = set(outcome.stdout.decode("utf-8", "replace").split("\n"))
    return sum(f"{mark}{number}" in said for number in range(len(asserts)))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
