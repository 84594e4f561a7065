"""Tests that are Python: what in a text is a test, by the conventions of HumanEval, MBPP, pytest and unittest.

- statements that assert, or that call what the text defines: the text itself is a test;
- `def check(candidate)` that nothing calls: called with the entry point (HumanEval, LeetCode);
- `def test_x()`, also parametrized, and methods of `class TestX` (pytest); fixtures are refused by name;
- methods test* of a unittest.TestCase;
- a comparison alone (`f(2) == 4`): asserted.
A text that asserts nothing belongs to the setup of the next one.
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
"""What a function of tests calls its one argument where this is the function to be tested."""
STANDARD = (
    *("math", "re", "collections", "itertools", "functools", "random", "string", "heapq", "bisect", "copy", "json"),
    *("sys", "os", "time", "datetime", "operator", "statistics", "typing", "io", "cmath", "decimal", "fractions"),
)
FILES = r"open|io\.open|os\.(?:mkdir|makedirs|remove|unlink)|(?:tempfile|shutil)\..*|.*\.(?:write_text|write_bytes)|mock_open"
"""Calls of tests that mean to share a folder with the program."""
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
"""By these names tests import the program."""


@dataclass
class Scripts:
    """Texts and the tests in them."""

    sources: list[str] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    name: str = "tests"
    """__name__ while they run."""
    shared: list[str] = field(default_factory=list)
    """Classes of the setup and the tests (nodes of trees and lists, ...) whose instances go to the program and back."""
    pieces: list[str] = field(default_factory=list)
    """Imports and classes of the tests, which the program may count on."""
    dropped: list[str] = field(default_factory=list)
    """What the setup only announces and the program defines."""
    wanted: list[str] = field(default_factory=list)
    """Every name that occurs."""
    modules: list[str] = field(default_factory=list)
    """Modules of the standard library that they use without importing them: never the program's."""
    imports: dict[str, list[str]] = field(default_factory=dict)
    """Names that are imported from modules that are not the standard library's."""

    @classmethod
    def read(cls, texts: Sequence[str], entry: str | None, setup: Sequence[str]) -> Scripts:
        """
        Raises:
            ValueError: a text that is no Python, needs what is not there, or asserts nothing.
        """
        found, pending, said = cls(), "", ""
        for text in texts:
            tree = _asserted(_parsed(text, "a test"))
            tests, why = _Text(tree, entry, len(found.sources)).tests()
            said = said or why
            source = f"{pending}{ast.unparse(tree)}\n"
            if not tests:
                pending = source
                continue
            if any(test["main"] for test in tests):
                found.name = "__main__"
            found.sources.append(source)
            found.tests += tests
            pending = ""
        if texts and not found.tests:
            raise ValueError(said or f"the tests assert nothing, so any program would pass: {texts[0].strip()[:80]!r}")
        found._survey(entry, [_parsed(text, "setup code") for text in setup])
        return found

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


class _Text:
    """One text of tests."""

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
        """(its tests, why it has none)."""
        for node in walked(list(self._body)):
            if isinstance(node, FUNCTIONS) and any("fixture" in ast.unparse(mark) for mark in node.decorator_list):
                raise ValueError(
                    f"the tests define the fixture {node.name}; fixtures are not supported, only plain tests"
                )
            if isinstance(node, ast.Call) and re.fullmatch(FILES, ast.unparse(node.func)):
                raise ValueError(f"the tests use files ({ast.unparse(node)[:60]}), which the program does not see")
        conventions = [*self._called(), *self._by_name(), *self._of_classes()]
        found = [self._test("body")] if self._checks(self._plain) else []
        if not found and not conventions and self._checks(self._guarded):
            return [self._test("body", main=True)], ""
        if found or conventions:
            return found + conventions, ""
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
        """Whether these statements assert, or call a function of this text."""
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


def _parsed(text: str, what: str) -> ast.Module:
    try:
        tree = ast.parse(text)
        compile(tree, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is not Python: {error}: {text.strip()[:80]!r}") from None
    return tree


def _asserted(tree: ast.Module) -> ast.Module:
    """`f(2) == 4`, if that is all."""
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
    """A function or class that is only announced."""
    if isinstance(node, ast.ClassDef):
        inner = [part for part in node.body if not _says_nothing(part)]
        return bool(inner) and all(isinstance(part, FUNCTIONS) and _is_stub(part) for part in inner)
    return isinstance(node, FUNCTIONS) and all(_says_nothing(part) for part in node.body)


def _says_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplemented" in ast.unparse(node)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _needed(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Parameters that somebody must fill, those of `parametrize` and `mock.patch` aside."""
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
    start = int(bool(needed) and needed[0] == "self")  # unittest.mock.patch hands its mocks over first
    return needed[:start] + needed[start + mocked :]


def _refuse_fixtures(name: str, needed: list[str]) -> None:
    if needed:
        raise ValueError(f"{name} of the tests takes {', '.join(needed)}: fixtures are not supported, only plain tests")
