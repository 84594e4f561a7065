"""Find the tests in Python source, by the conventions of HumanEval, MBPP, pytest and unittest.

- statements that assert, or that call functions of the source: the source itself is a test;
- an uncalled `def check(candidate)`: called with the entry point (HumanEval, LeetCode);
- `def test_x()`, also parametrized, and methods of `class TestX` (pytest); fixtures are not supported;
- methods test* of a unittest.TestCase;
- a bare comparison (`f(2) == 4`): asserted.
A source without assertions is prepended to the next one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligner.reward.sandboxed.checks import asserts, walked, without_runners

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CANDIDATES = {"candidate", "func", "fn", "f", "function", "solution"}
"""Names of a test function's single argument that mean the function under test."""
STANDARD = (
    *("math", "re", "collections", "itertools", "functools", "random", "string", "heapq", "bisect", "copy", "json"),
    *("sys", "os", "time", "datetime", "operator", "statistics", "typing", "io", "cmath", "decimal", "fractions"),
)
FILES = r"open|io\.open|os\.(?:mkdir|makedirs|remove|unlink)|(?:tempfile|shutil)\..*|.*\.(?:write_text|write_bytes)|mock_open"
"""Calls in tests that expect to share a folder with the program."""
MODULES = [
    "solution",
    "answer",
    "submission",
    "candidate",
    "program",
    "response",
    "main",
    "your_module",
    "your_solution",
    "my_module",
    "my_solution",
    "solution_module",
    "code_solution",
    "module",
]
"""Module names by which tests import the program."""


@dataclass
class PythonTests:
    """Python sources and the tests found in them."""

    sources: list[str] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    name: str = "tests"
    """Value of __name__ while they run."""
    shared: list[str] = field(default_factory=list)
    """Classes of the setup and the tests (tree and list nodes, ...) whose instances are passed to the program by value."""
    pieces: list[str] = field(default_factory=list)
    """Imports and classes of the tests that the program may use."""
    dropped: list[str] = field(default_factory=list)
    """Names that the setup only declares (stubs) and the program defines."""
    wanted: list[str] = field(default_factory=list)
    """All names that occur."""
    modules: list[str] = field(default_factory=list)
    """Standard library modules that the tests use without importing them; never taken from the program."""
    imports: dict[str, list[str]] = field(default_factory=dict)
    """Module -> names that the tests import from it."""

    @classmethod
    def read(cls, texts: Sequence[str], entry: str | None, setup: Sequence[str]) -> PythonTests:
        """Parse test sources.

        Args:
            texts: the sources. entry: the function under test, or Solution().method. setup: sources that run before them.

        Raises:
            ValueError: a source that is not Python, needs something unsupported, or asserts nothing.
        """
        scripts, pending, reason = cls(), "", ""
        for text in texts:
            tree = _asserted(_parsed(text, "a test"))
            tests, why = _Source(tree, entry, len(scripts.sources)).tests()
            reason = reason or why
            source = f"{pending}{ast.unparse(tree)}\n"
            if not tests:
                pending = source
                continue
            if any(test["main"] for test in tests):
                scripts.name = "__main__"
            scripts.sources.append(source)
            scripts.tests += tests
            pending = ""
        if texts and not scripts.tests:
            raise ValueError(
                reason or f"the tests assert nothing, so any program would pass: {texts[0].strip()[:80]!r}"
            )
        scripts._survey(entry, [_parsed(text, "setup code") for text in setup])
        return scripts

    def _survey(self, entry: str | None, setup: list[ast.Module]) -> None:
        own = [ast.parse(source) for source in self.sources]
        stubs = [node.name for tree in setup for node in tree.body if _is_stub(node)]  # type: ignore[attr-defined]
        last = [entry.split(".")[-1]] if entry else []
        self.dropped = list(dict.fromkeys([*stubs, *last, "Solution"]))
        for tree in (*setup, *own):
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not _is_test_class(node) and node.name not in self.dropped:
                    self.shared.append(node.name)
        for tree in own:
            for node in tree.body:
                if isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "name", None) in self.shared:
                    self.pieces.append(ast.unparse(node))
                if isinstance(node, ast.ImportFrom) and node.module:
                    self.imports.setdefault(node.module, []).extend(alias.name for alias in node.names)
        names = {node.id for tree in (*setup, *own) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        owners = [node.value for tree in own for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        self.modules = sorted({node.id for node in owners if isinstance(node, ast.Name)} & set(STANDARD) - set(last))
        self.wanted = sorted((names | set(last)) - set(self.modules))


class _Source:
    """One source of tests."""

    def __init__(self, tree: ast.Module, entry: str | None, number: int) -> None:
        self._entry, self._number = entry, number
        self._body = without_runners(tree).body
        self._functions = [node for node in self._body if isinstance(node, FUNCTIONS)]
        guarded = [node for node in self._body if _is_main(node)]
        self._plain = [
            node for node in self._body if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node not in guarded
        ]
        self._guarded = guarded

    def tests(self) -> tuple[list[dict[str, Any]], str]:
        """(its tests; the reason if it has none)."""
        for node in walked(list(self._body)):
            if isinstance(node, FUNCTIONS) and any("fixture" in ast.unparse(mark) for mark in node.decorator_list):
                raise ValueError(
                    f"the tests define the fixture {node.name}; fixtures are not supported, only ordinary tests"
                )
            if isinstance(node, ast.Call) and re.fullmatch(FILES, ast.unparse(node.func)):
                raise ValueError(f"the tests use files ({ast.unparse(node)[:60]}), which the program cannot see")
        conventions = [*self._called(), *self._by_name(), *self._of_classes()]
        body_tests = [self._test("body")] if self._checks(self._plain) else []
        if not body_tests and not conventions and self._checks(self._guarded):
            return [self._test("body", main=True)], ""
        if body_tests or conventions:
            return body_tests + conventions, ""
        idle = [node.name for node in self._functions if any(map(asserts, ast.walk(node)))]
        why = (
            f"nothing calls what the tests define: {', '.join(idle)}; give the row an entry_point, or call it"
            if idle
            else ""
        )
        if why and not any(node.name == "check" for node in self._functions):
            why = f"nothing calls what the tests define: {', '.join(idle)}; call it, or name it test_..."
        return [], why

    def _test(self, kind: str, main: bool = False, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "script": self._number, "main": main, **more}

    def _checks(self, nodes: list[ast.stmt]) -> bool:
        """Whether these statements assert, raise, or call a function of this source."""
        own = {node.name for node in self._functions}
        return any(asserts(node) or _called_name(node) in own for node in walked(nodes)) or any(
            isinstance(node, ast.Raise) for node in walked(nodes)
        )

    def _uncalled(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        used = {node.id for node in walked([*self._plain, *self._guarded]) if isinstance(node, ast.Name)}
        return (node for node in self._functions if node.name not in used)

    def _called(self) -> Iterator[dict[str, Any]]:
        for node in self._uncalled():
            needed = _needed(node)
            if not (node.name == "check" and len(needed) == 1) and not (
                node.name.startswith("test") and len(needed) == 1 and needed[0] in CANDIDATES
            ):
                continue
            if not self._entry:
                raise ValueError(f"nothing calls {node.name}({needed[0]}) of the tests; give the row an entry_point")
            yield self._test("check", name=node.name, entry=self._entry)

    def _by_name(self) -> Iterator[dict[str, Any]]:
        for node in self._uncalled():
            needed = _needed(node)
            if not node.name.startswith("test") or (len(needed) == 1 and needed[0] in CANDIDATES):
                continue
            _refuse_fixtures(node.name, needed)
            yield self._test("function", name=node.name)

    def _of_classes(self) -> Iterator[dict[str, Any]]:
        for owner in self._body:
            if not isinstance(owner, ast.ClassDef) or not _is_test_class(owner):
                continue
            for node in owner.body:
                if isinstance(node, FUNCTIONS) and node.name.startswith("test"):
                    _refuse_fixtures(f"{owner.name}.{node.name}", _needed(node)[1:])
                    yield self._test("method", owner=owner.name, name=node.name)


def _parsed(text: str, name: str) -> ast.Module:
    try:
        tree = ast.parse(text)
        compile(tree, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is not Python: {error}: {text.strip()[:80]!r}") from None
    return tree


def _asserted(tree: ast.Module) -> ast.Module:
    """Turn a source that is only a comparison, such as `f(2) == 4`, into an assert."""
    only = tree.body[0] if len(tree.body) == 1 else None
    if isinstance(only, ast.Expr) and (
        isinstance(only.value, ast.Compare | ast.BoolOp)
        or (isinstance(only.value, ast.UnaryOp) and isinstance(only.value.op, ast.Not))
    ):
        tree.body = [ast.copy_location(ast.Assert(only.value, None), only)]
    return tree


def _called_name(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _is_test_class(node: ast.ClassDef) -> bool:
    bases = [ast.unparse(base) for base in node.bases]
    return any(base.endswith("TestCase") for base in bases) or node.name.startswith("Test")


def _is_stub(node: ast.stmt) -> bool:
    """Whether it is a function or class that is only declared."""
    if isinstance(node, ast.ClassDef):
        inner = [part for part in node.body if not _is_placeholder(part)]
        return bool(inner) and all(isinstance(part, FUNCTIONS) and _is_stub(part) for part in inner)
    return isinstance(node, FUNCTIONS) and all(_is_placeholder(part) for part in node.body)


def _is_placeholder(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplemented" in ast.unparse(node)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _needed(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Required parameters, except those filled by `parametrize` and `mock.patch`."""
    filled: set[str] = set()
    mocked = 0
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize") and mark.args:
            first = mark.args[0]
            names = [first] if isinstance(first, ast.Constant) else getattr(first, "elts", [])
            texts = [str(name.value) for name in names if isinstance(name, ast.Constant)]
            filled |= {part.strip() for text in texts for part in text.split(",")}
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith(("patch", "patch.object")):
            mocked += len(mark.args) < (3 if ast.unparse(mark.func).endswith("object") else 2)
        if isinstance(mark, ast.Call) and any(keyword.arg == "indirect" for keyword in mark.keywords):
            raise ValueError(f"{node.name} of the tests uses parametrize(indirect=...), which needs fixtures")
    taken = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
    taken = taken[: len(taken) - len(node.args.defaults)]
    keyword = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    needed = [name for name in taken + [arg.arg for arg, default in keyword if default is None] if name not in filled]
    start = int(bool(needed) and needed[0] == "self")  # unittest.mock.patch passes its mocks first
    return needed[:start] + needed[start + mocked :]


def _refuse_fixtures(name: str, needed: list[str]) -> None:
    if needed:
        raise ValueError(
            f"{name} of the tests takes {', '.join(needed)}: fixtures are not supported, only ordinary tests"
        )
