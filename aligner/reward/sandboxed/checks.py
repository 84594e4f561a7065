"""Which statements assert, when two results are equal, and a minimal pytest replacement for tests in the sandbox."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

CALLS = ("assert", "raises", "fail")
RUNNERS = {"unittest.main", "pytest.main", "sys.exit", "exit", "quit"}
NEAR = {"rel_tol": 1e-5, "abs_tol": 1e-8}
"""Tolerances of numpy.allclose, as in the evaluators of APPS and PRIME."""


def asserts(node: ast.AST) -> bool:
    """Whether a statement can fail a test by itself."""
    if isinstance(node, ast.Assert):
        return any(isinstance(part, ast.Name | ast.Attribute) for part in ast.walk(node.test))
    if isinstance(node, ast.If):
        return any(isinstance(part, ast.Raise) for part in node.body + node.orelse)
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(_calls(item.context_expr) for item in node.items)
    return isinstance(node, ast.Expr) and _calls(node.value)


def _calls(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith(CALLS)


def without_runners(tree: ast.Module) -> ast.Module:
    """Remove calls such as unittest.main(), which would end the process; the harness runs the tests by name."""
    tree.body = [node for node in tree.body if not _runs_others(node)]
    return tree


def _runs_others(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node.value.func) in RUNNERS


def equal_results(result: Any, expected: Any) -> bool:
    """Compare a function's result with the expected value from JSON: tuples equal lists, keys may be numbers, floats are
    compared with tolerance."""
    if isinstance(expected, list | tuple):
        alike = isinstance(result, list | tuple) and len(result) == len(expected)
        return alike and all(equal_results(a, b) for a, b in zip(result, expected, strict=True))
    if isinstance(expected, dict):
        if not isinstance(result, dict) or len(result) != len(expected):
            return False
        keyed = result if all(key in result for key in expected) else {str(key): value for key, value in result.items()}
        return all(key in keyed and equal_results(keyed[key], value) for key, value in expected.items())
    if isinstance(expected, int | float):
        if not isinstance(result, int | float):
            return False
        if isinstance(result, int) and isinstance(expected, int):
            return result == expected
        return math.isclose(result, expected, **NEAR) or (result != result and expected != expected)
    return isinstance(result, type(expected)) and bool(result == expected)


class _Raises:
    """`with pytest.raises(...)`."""

    def __init__(self, kinds: Any, match: str | None) -> None:
        self._kinds, self._match = kinds, match
        self.value: Any = None
        self.type: Any = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None:
            raise AssertionError(f"DID NOT RAISE {self._kinds}")
        if not isinstance(error, self._kinds):
            return False
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self._match!r}")
        self.value, self.type = error, kind
        return True


class _Near:
    """`pytest.approx(...)`."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self._expected, self._nan_ok = expected, nan_ok
        self._absolute = 1e-12 if abs is None else abs
        self._relative = (1e-6 if abs is None else 0.0) if rel is None else rel

    def __eq__(self, value: object) -> bool:
        return self._near(value, self._expected)

    def _near(self, value: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return isinstance(value, dict) and value.keys() == expected.keys() and all(
                self._near(value[key], expected[key]) for key in expected
            )  # fmt: skip
        if isinstance(expected, list | tuple):
            return (
                isinstance(value, list | tuple)
                and len(value) == len(expected)
                and all(map(self._near, value, expected))
            )
        if not isinstance(value, int | float | complex) or not isinstance(expected, int | float | complex):
            return bool(type(value) is type(expected) and value == expected)
        if value == expected or (self._nan_ok and value != value and expected != expected):
            return True
        return abs(value - expected) <= max(self._relative * abs(expected), self._absolute) < math.inf


class _Mark:
    """`pytest.mark`: only parametrize has an effect."""

    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else lambda thing: thing

        return mark

    def parametrize(self, names: Any, values: Any, **kwargs: Any) -> Any:
        """Store the parameter sets on the function."""
        keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = [row._values if isinstance(row, _Row) else (row,) if len(keys) == 1 else tuple(row) for row in values]

        def mark(function: Any) -> Any:
            sets = [dict(zip(keys, row, strict=True)) for row in rows]
            function._parameters = [*getattr(function, "_parameters", []), sets]
            return function

        return mark


class _Row:
    """`pytest.param(...)`."""

    def __init__(self, *values: Any, **kwargs: Any) -> None:
        self._values = values


def pytest_names() -> dict[str, Any]:
    """The parts of pytest that tests use; pytest itself is not in the sandbox."""

    def raises(kinds: Any, *called: Any, match: str | None = None, **kwargs: Any) -> Any:
        context = _Raises(kinds, match)
        if not called:
            return context
        with context:
            called[0](*called[1:], **kwargs)
        return context

    def fail(reason: str = "", **kwargs: Any) -> None:
        raise AssertionError(reason)

    return {"raises": raises, "approx": _Near, "mark": _Mark(), "param": _Row, "fail": fail}


def walked(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """All AST nodes below these."""
    for node in nodes:
        yield from ast.walk(node)
