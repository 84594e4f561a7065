"""What counts as an assertion, when two values are the same, and what the tests find under the name pytest."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

CALLS = ("assert", "raises", "fail")
RUNNERS = {"unittest.main", "pytest.main", "sys.exit", "exit", "quit"}
NEAR = {"rel_tol": 1e-5, "abs_tol": 1e-8}
"""numpy.allclose's, with which the evaluators of APPS and PRIME compare."""


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
    """Without unittest.main() and its like, which end the process; what they would run is run by its name."""
    tree.body = [node for node in tree.body if not _runs_others(node)]
    return tree


def _runs_others(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node.value.func) in RUNNERS


def same(found: Any, wanted: Any) -> bool:
    """Of a function's result and what JSON says of it: tuples are lists, keys may be numbers, floats are near."""
    if isinstance(wanted, list | tuple):
        alike = isinstance(found, list | tuple) and len(found) == len(wanted)
        return alike and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, dict):
        if not isinstance(found, dict) or len(found) != len(wanted):
            return False
        keyed = found if all(key in found for key in wanted) else {str(key): value for key, value in found.items()}
        return all(key in keyed and same(keyed[key], value) for key, value in wanted.items())
    if isinstance(wanted, int | float):
        if not isinstance(found, int | float):
            return False
        if isinstance(found, int) and isinstance(wanted, int):
            return found == wanted
        return math.isclose(found, wanted, **NEAR) or (found != found and wanted != wanted)
    return isinstance(found, type(wanted)) and bool(found == wanted)


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

    def __init__(self, wanted: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self._wanted, self._nan_ok = wanted, nan_ok
        self._absolute = 1e-12 if abs is None else abs
        self._relative = (1e-6 if abs is None else 0.0) if rel is None else rel

    def __eq__(self, found: object) -> bool:
        return self._near(found, self._wanted)

    def _near(self, found: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            return isinstance(found, dict) and found.keys() == wanted.keys() and all(
                self._near(found[key], wanted[key]) for key in wanted
            )  # fmt: skip
        if isinstance(wanted, list | tuple):
            return isinstance(found, list | tuple) and len(found) == len(wanted) and all(map(self._near, found, wanted))
        if not isinstance(found, int | float | complex) or not isinstance(wanted, int | float | complex):
            return bool(type(found) is type(wanted) and found == wanted)
        if found == wanted or (self._nan_ok and found != found and wanted != wanted):
            return True
        return abs(found - wanted) <= max(self._relative * abs(wanted), self._absolute) < math.inf


class _Mark:
    """`pytest.mark`: parametrize; every other mark says nothing here."""

    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else lambda thing: thing

        return mark

    def parametrize(self, names: Any, values: Any, **kwargs: Any) -> Any:
        """Keeps the sets of values on the function."""
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
    """What tests use of pytest, which is not in the sandbox."""

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
    """Every node below these."""
    for node in nodes:
        yield from ast.walk(node)
