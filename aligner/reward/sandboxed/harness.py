"""Sandbox process that runs the tests of one row; it reaches the tested program only through a socket.

    python -I -S harness.py SOCKET_FD                         (standard input: the JSON of `suites.Suite.plan`)

Standard output, one JSON value per line: the number of each test that passed; {"broken": reason} if the tests themselves
are at fault; "done" at the end.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import itertools
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.getcwd())

import checks
from remote import FaultyTests, HarnessEndpoint, Proxy
from wire import DEEP, Endpoint, Gone, Link, Unpack

ASSERTED = "__asserted__"


class Counting(ast.NodeTransformer):
    """Inserts a counting call before every assertion, so that tests without assertions are detected."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        call = ast.Expr(ast.Call(ast.Name(ASSERTED, ast.Load()), [], []))
        return [ast.copy_location(call, node), node] if checks.asserts(node) else node

    visit_Assert = visit_Expr = visit_If = visit_With = visit_AsyncWith = _counted


class Tests:
    """The tests of a row and their namespace."""

    def __init__(self, judge: HarnessEndpoint, plan: dict[str, Any], report: Callable[[Any], None]) -> None:
        self._judge, self._plan, self._report = judge, plan, report
        self._asserted = 0
        self._modules: set[str] = set()
        self._layer = dict(vars(builtins))
        self.names: dict[str, Any] = {"__name__": plan["name"], "__builtins__": self._layer}
        self._layer[ASSERTED] = self._count

    def _count(self) -> None:
        self._asserted += 1

    def prepare(self, names: list[str]) -> None:
        """Run the setup, and make the program's names visible to the tests below their own names."""
        try:
            for source in self._plan["setup"]:
                exec(compile(source, "setup.py", "exec"), self.names)
        except Exception as error:
            raise FaultyTests(f"the row's setup code raises {type(error).__name__}: {error}") from None
        for name in self._plan["dropped"]:
            self.names.pop(name, None)
        for name in self._plan["standard"]:
            self._layer[name] = importlib.import_module(name)
        used_names = set(self._plan["wanted"])
        own = [name for name in names if name in used_names and not hasattr(builtins, name)]
        hidden = [name for name in names if name in used_names and hasattr(builtins, name)]
        # A program that redefines len must not change it for the tests, unless it is the function under test.
        subject = self._plan["entry"] or (hidden[0] if len(hidden) == 1 and not own else None)
        for name in own + [name for name in hidden if name == subject]:
            value = self._layer[name] = self._judge.fetch(name)
            self._judge.used += not isinstance(value, Proxy) and not isinstance(value, type)
            if name == self._plan["entry"]:
                self.names.pop(name, None)
        program_modules = {name for name, parts in self._plan["imports"].items() if parts and set(parts) <= set(names)}
        self._modules = {*self._plan["modules"], *(program_modules - sys.stdlib_module_names - {"pytest"})}
        self._judge.install(names, sorted(self._modules))
        shared = set(self._plan["shared"])
        self._judge.shared = lambda name: self.names.get(name) if name in shared else None

    def run(self) -> None:
        """Run all tests in order; without `partial` stop at the first failure."""
        bodies: dict[int, bool] = {}
        for number, test in enumerate(self._plan["tests"]):
            passed = self._passed(test, bodies)
            if self._judge.broken:
                raise FaultyTests(self._judge.broken)
            if passed:
                self._report(number)
            elif not self._plan["partial"]:
                return
        if not self._judge.used:
            raise FaultyTests("the tests never use the program")

    def _passed(self, test: dict[str, Any], bodies: dict[int, bool]) -> bool:
        if test["kind"] == "call":
            return self._right(test)
        index = test["script"]
        if index not in bodies:  # the first test of a source: run the source itself
            bodies[index] = self._runs(lambda: self._execute(index), needed=test["kind"] == "body")
        if test["kind"] == "body" or not bodies[index]:
            return bodies[index]
        if test["kind"] == "check":
            return self._runs(lambda: self.names[test["name"]](self._subject(test["entry"])))
        if test["kind"] == "function":
            return self._runs(lambda: self._each(self.names[test["name"]]))
        owner = self.names[test["owner"]]
        if "unittest" in sys.modules and issubclass(owner, sys.modules["unittest"].TestCase):
            return self._runs(lambda: self._case(owner, test["name"]))
        return self._runs(lambda: self._method(owner, test["name"]))

    def _execute(self, index: int) -> None:
        source = self._plan["scripts"][index]
        tree = ast.fix_missing_locations(Counting().visit(checks.without_runners(ast.parse(source))))
        if "asyncio" in source:
            _await_proxies()
        exec(compile(tree, f"tests[{index}]", "exec"), self.names)

    def _runs(self, test: Callable[[], Any], needed: bool = True) -> bool:
        """Whether the test ends without raising and has asserted something (if that is `needed`)."""
        asserted = self._asserted
        try:
            test()
        except Gone:
            return False
        except FaultyTests:
            raise
        except BaseException as error:
            if self._judge.raised(error) or self._missing(error):
                return False
            if isinstance(error, SystemExit) and not error.code:  # the tests' own sys.exit(0)
                return self._asserted > asserted
            if isinstance(error, ImportError):
                raise FaultyTests(f"the tests import an unavailable module: {error}") from None
            if not self._judge.used:
                raise FaultyTests(f"the tests fail without the program: {type(error).__name__}: {error}") from None
            return False
        if needed and self._asserted == asserted and not self._judge.used:
            raise FaultyTests("the tests assert nothing and never use the program")
        return self._asserted > asserted or not needed

    def _missing(self, error: BaseException) -> bool:
        """Whether the error means that the program lacks a definition."""
        lacking = isinstance(error, ImportError) and error.name in self._modules
        return (
            lacking or isinstance(error, NameError) or (isinstance(error, AttributeError) and "solution" in str(error))
        )

    def _subject(self, entry: str) -> Any:
        """The function under test, or a method of a new Solution()."""
        self._judge.used += 1
        owner, _, name = entry.rpartition(".")
        owner = owner.removesuffix("()")
        if not owner and name in self._judge.names:
            return self._judge.fetch(name)
        owner = owner or "Solution"
        if owner not in self._judge.names:
            raise NameError(f"name {name!r} is not defined")
        return getattr(self._judge.fetch(owner)(), name)

    def _right(self, test: dict[str, Any]) -> bool:
        try:
            args, kwargs, expected = (_unpacked(test[key]) for key in ("args", "kwargs", "wanted"))
            result = self._subject(test["entry"])(*args, **kwargs)
        except FaultyTests:
            raise
        except BaseException:
            return False
        return checks.equal_results(result, expected) or (test["unwrap"] and checks.equal_results(result, expected[0]))

    def _each(self, function: Any, *first: Any) -> None:
        """Call a test once, or once per set of parameters."""
        sets = getattr(function, "_parameters", [])
        for values in itertools.product(*sets):
            arguments = {key: value for part in values for key, value in part.items()}
            outcome = function(*first, **arguments)
            if isinstance(outcome, types.CoroutineType):
                importlib.import_module("asyncio").run(outcome)

    def _method(self, owner: Any, name: str) -> None:
        for hook in ("setup_class", "setup_method", "setup", name, "teardown_method", "teardown"):
            if hook == "setup_class":
                thing = owner()
            method = getattr(thing, hook, None)
            if hook == name:
                self._each(method)
            elif method is not None:
                method(*[method][: method.__code__.co_argcount - 1])

    def _case(self, owner: Any, name: str) -> None:
        unittest = sys.modules["unittest"]
        result = unittest.TestResult()
        unittest.TestSuite([owner(name)]).run(result)
        if result.skipped:
            raise FaultyTests(f"{owner.__name__}.{name} is skipped")
        if not result.wasSuccessful() or not result.testsRun:
            raise AssertionError("\n".join(text for _, text in result.failures + result.errors))


def _await_proxies() -> None:
    """Make asyncio.run accept proxies of coroutines."""
    asyncio: Any = importlib.import_module("asyncio")
    run = asyncio.run

    async def whole(thing: Any) -> Any:
        return await thing

    asyncio.run = lambda main, **kwargs: run(whole(main) if isinstance(main, Proxy) else main, **kwargs)


def _unpacked(packed: list[Any]) -> Any:
    return Unpack(Endpoint(), packed[1]).value(packed[0])


def main() -> None:
    """See the module docstring."""
    plan = json.load(sys.stdin)
    report_fd = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.stdin = io.StringIO()

    def report(value: Any) -> None:
        os.write(report_fd, (json.dumps(value) + "\n").encode())

    judge = HarnessEndpoint(Link(int(sys.argv[1])))
    sys.setrecursionlimit(DEEP // 100)
    sys.modules["pytest"] = types.ModuleType("pytest")
    vars(sys.modules["pytest"]).update(checks.pytest_names())
    try:
        names = judge.hello()
        if names is not None:  # a program that does not load passes no test
            tests = Tests(judge, plan, report)
            tests.prepare(names)
            tests.run()
    except FaultyTests as error:
        report({"broken": str(error)})
    except Gone:
        pass
    report("done")
    os._exit(0)


if __name__ == "__main__":
    main()
