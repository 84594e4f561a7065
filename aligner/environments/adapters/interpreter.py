"""The tool `python`: runs a program of the policy's in the sandbox of the rules (no network, no files of this machine)."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

SANDBOX = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "reward", "sandbox.py")
"""A file of standard library, with confine.py beside it: any interpreter can load it by its path."""


def _sandbox() -> Any:
    name = "environment_sandbox"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, os.path.realpath(SANDBOX))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Interpreter:
    """A Python interpreter that begins anew with each call."""

    def __init__(self, seconds: float = 5.0, memory_mb: int = 512, isolation: str = "namespaces") -> None:
        """
        Args:
            seconds: limit of a program.
            memory_mb: limit of each of its processes, in MiB.
            isolation: namespaces, or limits where the kernel has none; see `aligner.reward.sandbox.run_python`.
        """
        self._limits = _sandbox().Limits(seconds=seconds, memory_mb=memory_mb, output_kb=256)
        self._seconds, self._isolation = seconds, isolation

    @staticmethod
    def _problem(seconds: float = 5.0, memory_mb: int = 512, isolation: str = "namespaces") -> str | None:
        """Why it cannot work here, or None."""
        if isolation not in _sandbox().ISOLATION:
            return f"isolation={isolation} is unknown; use {' or '.join(_sandbox().ISOLATION)}"
        reason = _sandbox().isolation_problem(isolation)
        other = "; use isolation=limits where programs are trusted" if isolation == "namespaces" else ""
        return f"the sandbox does not work on this machine: {reason}{other}" if reason else None

    def python(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: The program. Only what it prints is returned; nothing is kept between calls.
        """
        outcome = _sandbox().run_python(["main.py"], {"main.py": code}, limits=self._limits, isolation=self._isolation)
        text: str = (outcome.stdout + outcome.stderr).decode("utf-8", "replace").strip()
        if outcome.stopped == "time":
            text += f"\n[stopped after {self._seconds:g} seconds]"
        elif outcome.stopped:
            text += "\n[stopped: too much output]"
        elif outcome.code and not outcome.stderr:
            text += f"\n[ended with exit code {outcome.code}]"
        return text.strip()
