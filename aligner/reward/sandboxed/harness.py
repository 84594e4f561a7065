"""Run as a program: the tests of one row, which reach the program they test through a socket only.

    python -I -S harness.py SOCKET_FD                         (the plan, JSON of `suites.Suite.plan`, on standard input)

Its standard output has one JSON value a line: the number of each test that passed; {"broken": why} where the tests
themselves are at fault; and "done".
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
from remote import Broken, Judge, Proxy
from wire import DEEP, Gone, Link, Unpack, WeightLayout

ASSERTED = "__asserted__"


class Counting(ast.NodeTransformer):
    """Puts a call in front of everything that asserts, so that a test which asserts nothing is seen."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        call = ast.Expr(ast.Call(ast.Name(ASSERTED, ast.Load()), [], []))
        return [ast.copy_location(call, node), node] if checks.asserts(node) else node

    visit_Assert = visit_Expr = visit_If = visit_With = visit_AsyncWith = _counted


class Tests:
    """The tests of a row and the namespace in which they run."""

    def __init__(self, judge: Judge, plan: dict[str, Any], report: Callable[[Any], None]) -> None:
        self._judge, self._plan, self._report = judge, plan, report
        self._asserted = 0
        self._modules: set[str] = set()
        self._layer = dict(vars(builtins))
        self.names: dict[str, Any] = {"__name__": plan["name"], "__builtins__": self._layer}
        self._layer[ASSERTED] = self._count

    def _count(self) -> None:
        self._asserted += 1

    def prepare(self, names: list[str]) -> None:
        """Run the setup, and put the names of the program under those of the tests."""
        try:
            for source in self._plan["setup"]:
                exec(compile(source, "setup.py", "exec"), self.names)
        except Exception as error:
            raise Broken(f"the row's setup code raises {type(error).__name__}: {error}") from None
        for name in self._plan["dropped"]:
            self.names.pop(name, None)
        for name in self._plan["standard"]:
            self._layer[name] = importlib.import_module(name)
        wanted = set(self._plan["wanted"])
        own = [name for name in names if name in wanted and not hasattr(builtins, name)]
        hidden = [name for name in names if name in wanted and hasattr(builtins, name)]
        # A program that redefines len must not change what the tests mean by it, unless it is what they test.
        subject = self._plan["entry"] or (hidden[0] if len(hidden) == 1 and not own else None)
        for name in own + [name for name in hidden if name == subject]:
            value = self._layer[name] = self._judge.fetch(name)
            self._judge.used += not isinstance(value, Proxy) and not isinstance(value, type)
            if name == self._plan["entry"]:
                self.names.pop(name, None)
        known = {name for name, parts in self._plan["imports"].items() if parts and set(parts) <= set(names)}
        self._modules = {*self._plan["modules"], *(known - sys.stdlib_module_names - {"pytest"})}
        self._judge.install(names, sorted(self._modules))
        shared = set(self._plan["shared"])
        self._judge.shared = lambda name: self.names.get(name) if name in shared else None

    def run(self) -> None:
        """Each test in its order; without `partial` only until one fails."""
        bodies: dict[int, bool] = {}
        for number, test in enumerate(self._plan["tests"]):
            passed = self._passed(test, bodies)
            if self._judge.broken:
                raise Broken(self._judge.broken)
            if passed:
                self._report(number)
            elif not self._plan["partial"]:
                return
        if not self._judge.used:
            raise Broken("the tests never use the program")

    def _passed(self, test: dict[str, Any], bodies: dict[int, bool]) -> bool:
        if test["kind"] == "call":
            return self._right(test)
        index = test["script"]
        if index not in bodies:  # the first test of a text: run the text itself
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
        """Whether it ends without raising and has asserted something (where that is `needed`)."""
        asserted = self._asserted
        try:
            test()
        except Gone:
            return False
        except Broken:
            raise
        except BaseException as error:
            if self._judge.raised(error) or self._missing(error):
                return False
            if isinstance(error, SystemExit) and not error.code:  # the tests' own sys.exit(0)
                return self._asserted > asserted
            if isinstance(error, ImportError):
                raise Broken(f"the tests import what is not here: {error}") from None
            if not self._judge.used:
                raise Broken(f"the tests fail without the program: {type(error).__name__}: {error}") from None
            return False
        if needed and self._asserted == asserted and not self._judge.used:
            raise Broken("the tests assert nothing and never use the program")
        return self._asserted > asserted or not needed

    def _missing(self, error: BaseException) -> bool:
        """Something that the program should have defined."""
        lacking = isinstance(error, ImportError) and error.name in self._modules
        return (
            lacking or isinstance(error, NameError) or (isinstance(error, AttributeError) and "solution" in str(error))
        )

    def _subject(self, entry: str) -> Any:
        """What the tests are about: a function, or a method of a fresh Solution()."""
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
            args, kwargs, wanted = (_unpacked(test[key]) for key in ("args", "kwargs", "wanted"))
            found = self._subject(test["entry"])(*args, **kwargs)
        except Broken:
            raise
        except BaseException:
            return False
        return checks.same(found, wanted) or (test["unwrap"] and checks.same(found, wanted[0]))

    def _each(self, function: Any, *first: Any) -> None:
        """Once, or once for each set of parameters."""
        sets = getattr(function, "_parameters", [])
        for values in itertools.product(*sets):
            given = {key: value for part in values for key, value in part.items()}
            outcome = function(*first, **given)
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
            raise Broken(f"{owner.__name__}.{name} is skipped")
        if not result.wasSuccessful() or not result.testsRun:
            raise AssertionError("\n".join(text for _, text in result.failures + result.errors))


def _await_proxies() -> None:
    """asyncio.run takes no stand-in of a coroutine."""
    asyncio: Any = importlib.import_module("asyncio")
    run = asyncio.run

    async def whole(thing: Any) -> Any:
        return await thing

    asyncio.run = lambda main, **kwargs: run(whole(main) if isinstance(main, Proxy) else main, **kwargs)


def _unpacked(packed: list[Any]) -> Any:
    return Unpack(WeightLayout(), packed[1]).value(packed[0])


def main() -> None:
    """See the top of this file."""
    plan = json.load(sys.stdin)
    report_fd = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.stdin = io.StringIO()

    def report(said: Any) -> None:
        os.write(report_fd, (json.dumps(said) + "\n").encode())

    judge = Judge(Link(int(sys.argv[1])))
    sys.setrecursionlimit(DEEP // 100)
    sys.modules["pytest"] = types.ModuleType("pytest")
    vars(sys.modules["pytest"]).update(checks.pytest_names())
    try:
        names = judge.hello()
        if names is not None:  # a program that does not even load passes nothing
            tests = Tests(judge, plan, report)
            tests.prepare(names)
            tests.run()
    except Broken as error:
        report({"broken": str(error)})
    except Gone:
        pass
    report("done")
    os._exit(0)


if __name__ == "__main__":
    main()
