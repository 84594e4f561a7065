"""Sandbox process that loads the program under test and serves the tests' requests.

python -I -S served.py SOCKET_FD        (on standard input: {"setup": [source], "pieces": [source], "code": source})
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import json
import operator
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.getcwd())

from wire import (
    BINARY,
    COMPARISONS,
    DEEP,
    MUTABLE,
    UNARY,
    Endpoint,
    Foreign,
    Gone,
    Link,
    Pack,
    Unpack,
    base_of,
    state_of,
)

STARRED = "string re datetime collections heapq bisect copy math random statistics itertools functools operator typing"
RECURSION = 50_000
PRINTED = 1 << 20
CONTAINERS = (list, dict, set)


def _enter(thing: Any) -> Any:
    return type(thing).__enter__(thing)


async def _awaited(thing: Any) -> Any:
    return await thing


def _exit(thing: Any) -> Any:
    return type(thing).__exit__(thing, None, None, None)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "enter": _enter,
    "exit": _exit,
    "await": lambda thing: importlib.import_module("asyncio").run(_awaited(thing)),
    "plain": base_of,
    "delitem": operator.delitem,
    "setitem": operator.setitem,
    **{
        name: getattr(builtins, name)
        for name in [
            "getattr",
            "setattr",
            "delattr",
            "len",
            "iter",
            "next",
            "repr",
            "str",
            "hash",
            "bool",
            "dir",
            "isinstance",
            "issubclass",
            "reversed",
        ]
    },
    **{
        name: getattr(operator, name)
        for name in [
            *("getitem", "contains", "eq", "ne"),
            *COMPARISONS,
            *UNARY,
            *BINARY,
        ]
    },
}


class Stub:
    """Proxy of an object of the tests: can be called and asked for public attributes."""

    def __init__(self, program: Program, number: int, about: dict[str, str]) -> None:
        self.__dict__.update(_program=program, _number=number, **about)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._program.ask("getattr", self._number, (name,), {})


class Input(io.TextIOBase):
    """Standard input, read on the tests' side."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        """The next line, "" at the end."""
        if not self._program.loaded:  # nothing to read: the tests have not begun
            return ""
        return str(self._program.ask("readline", 0, (), {}))

    def read(self, size: int | None = -1) -> str:
        """All remaining lines."""
        return "".join(iter(self.readline, ""))

    def asked(self, prompt: object = "") -> str:
        """`input()`, forwarded to the tests' side."""
        if not self._program.loaded:
            raise EOFError("EOF when reading a line")
        return str(self._program.ask("input", 0, (str(prompt),), {}))


class Program(Endpoint):
    """The program's namespace and the objects that the tests refer to."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.RLock()
        self._things: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._made: set[int] = set()
        """Objects created by calling a class; never passed by value, even if the class derives from list or dict."""
        self.shared: dict[str, Any] = {}
        self.loaded = False
        self.module = types.ModuleType("solution")
        sys.modules["solution"] = self.module

    def prepare(self, request: dict[str, Any]) -> None:
        """Run the setup. Its names and the usual imports are available to the program like builtins."""
        builtin_names = dict(vars(builtins))
        if _unknown(request["code"]) - set(builtin_names):
            builtin_names = _usual() | builtin_names
        namespace: dict[str, Any] = {"__name__": "setup", "__builtins__": builtin_names}
        for source in request["setup"]:
            exec(compile(source, "setup.py", "exec"), namespace)
        for source in request["pieces"]:
            with contextlib.suppress(Exception):  # a part of the tests that the program may do without
                exec(compile(source, "tests.py", "exec"), namespace)
        builtin_names |= {name: value for name, value in namespace.items() if not name.startswith("__")}
        self.shared = {name: value for name, value in namespace.items() if isinstance(value, type)}
        self.module.__dict__["__builtins__"] = builtin_names
        sys.setrecursionlimit(RECURSION)

    def load(self, code: str) -> bool:
        """Run the program. Returns whether it ended without raising."""
        try:
            exec(compile(code, "solution.py", "exec"), self.module.__dict__)
            self.loaded = True
        except BaseException:
            return False
        return self.loaded

    def names(self) -> list[str]:
        """Names that the program has defined."""
        return [name for name in vars(self.module) if not (name.startswith("__") and name.endswith("__"))]

    def serve(self) -> None:
        """Answer requests until the tests end."""
        while True:
            self._link.send(self._answer(self._link.receive()))

    def ask(self, what: str, number: int, args: Any, kwargs: Any) -> Any:
        """Execute an operation on the tests' side, during a request of theirs."""
        with self._lock:  # the program may have threads
            return self._ask(what, number, args, kwargs)

    def _ask(self, what: str, number: int, args: Any, kwargs: Any) -> Any:
        pack = Pack(self)
        request = {"ask": what, "thing": number, "args": pack.value(args), "kwargs": pack.value(kwargs)}
        self._link.send({**request, "nodes": pack.nodes})
        while True:
            reply = self._link.receive()
            if "op" in reply:  # the tests use the program in turn
                self._link.send(self._answer(reply))
                continue
            if "raise" in reply:
                raise getattr(builtins, reply["raise"][0], RuntimeError)(reply["raise"][1])
            return Unpack(self, reply["nodes"], pack).value(reply["value"])

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        printed, limit = io.StringIO(), sys.getrecursionlimit()
        sys.setrecursionlimit(DEEP)
        unpack = Unpack(self, request["nodes"])
        args = [unpack.value(arg) for arg in request["args"]]
        kwargs = {name: unpack.value(value) for name, value in request["kwargs"].items()}
        for number, content in request["filled"]:
            _fill(self._things[number], unpack.value(content))
        sys.setrecursionlimit(limit)
        stdout, sys.stdout = sys.stdout, printed
        reply: dict[str, Any] = {}
        value: Any = None
        try:
            value = self._do(request["op"], args, kwargs)
        except Gone:
            raise
        except BaseException as error:
            value = error
            reply["raised"] = True
        finally:
            limit = sys.getrecursionlimit()
            sys.stdout = stdout
        sys.setrecursionlimit(DEEP)
        pack = Pack(self, unpack)
        if "raised" in reply:
            reply["value"] = pack.value(self._exception_content(value))
        else:
            if request["op"] == "call" and isinstance(args[0], type):
                self._made.add(self._number(value))
            if request["op"] in ("getattr", "getitem") and type(value) in CONTAINERS:
                reply["held"] = self._number(value)
            reply["value"] = pack.value(value)
        reply["after"] = {i: pack.node(thing) for i, thing in unpack.built.items() if unpack.nodes[i][0] in MUTABLE}
        sys.setrecursionlimit(limit)
        return {**reply, "nodes": pack.nodes, "printed": printed.getvalue()[:PRINTED]}

    def _do(self, what: str, args: Any, kwargs: Any) -> Any:
        if what == "module":
            return self.module
        return OPERATIONS[what](*args, **kwargs)

    def _exception_content(self, error: BaseException) -> tuple[Any, ...]:
        kinds = [kind for kind in type(error).__mro__ if issubclass(kind, BaseException)]
        state = [(name, value) for name, value in state_of(error) if not name.startswith("__")]
        return [(kind.__name__, kind.__module__ == "builtins", self._number(kind)) for kind in kinds], error.args, state

    def _number(self, thing: Any) -> int:
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self._things)
            self._things.append(thing)
        return self._numbers[id(thing)]

    def foreign(self, thing: Any, pack: Pack) -> list[Any]:
        """Encode an object of the program; see `Endpoint.foreign`."""
        if type(thing) is Stub:
            return ["tests", thing._number, {}]
        if isinstance(thing, type) and thing in vars(builtins).values():
            return ["builtin", thing.__name__]
        number, kind = self._number(thing), type(thing)
        if isinstance(thing, type) and issubclass(thing, BaseException):
            return ["exception", number, thing.__name__, [self._number(base) for base in thing.__mro__[1:-1]],
                    [base.__name__ if base.__module__ == "builtins" else "" for base in thing.__mro__[1:-1]]]  # fmt: skip
        if kind.__name__ in self.shared and not isinstance(thing, type):
            return ["instance", kind.__name__, [[name, pack.value(value)] for name, value in state_of(thing)]]
        try:
            plain = base_of(thing)
        except Foreign:
            plain = None
        if plain is not None and number not in self._made:
            return ["extended", number, pack.value(plain)]
        flags = {
            "plain": plain is not None,
            "await": hasattr(kind, "__await__"),
            "kind": kind.__name__ if kind.__module__ == "builtins" else "",
        }
        return ["thing", number, flags]

    def native(self, node: list[Any], unpack: Unpack) -> Any:
        """Decode a reference from the tests; see `Endpoint.native`."""
        tag = node[0]
        if tag == "thing":
            return self._things[node[1]]
        if tag == "tests":
            return Stub(self, node[1], node[2])
        if tag == "instance":
            kind = vars(self.module).get(node[1], self.shared[node[1]])
            return object.__new__(kind)
        assert tag == "global"
        if not node[1]:
            return vars(self.module).get(node[2], self.shared[node[2]])
        thing = importlib.import_module(node[1])
        for name in node[2].split("."):
            thing = getattr(thing, name)
        return thing


def _fill(thing: Any, content: Any) -> None:
    """Update a container that the tests have changed."""
    if isinstance(thing, list):
        thing[:] = content
    else:
        thing.clear()
        thing.update(content)


def _nodes(source: str) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _unknown(source: str) -> set[str]:
    """Names that the source uses but never binds (approximately)."""
    used: set[str] = set()
    bound: set[str] = set()
    for node in _nodes(source):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return used - bound


def _usual() -> dict[str, Any]:
    """Modules and names that the evaluators of LiveCodeBench and APPS import for every program."""
    names: dict[str, Any] = {}
    for name in STARRED.split():
        module = importlib.import_module(name)
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        names |= {name: getattr(module, name) for name in public}
    modules = {name: importlib.import_module(name) for name in [*STARRED.split(), "io", "json", "sys", "os", "time"]}
    return names | modules | {"inf": float("inf")}


def main() -> None:
    """See the module docstring."""
    request = json.load(sys.stdin)
    link = Link(int(sys.argv[1]))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    program = Program(link)
    given_input = Input(program)
    sys.stdin, builtins.input = given_input, given_input.asked  # type: ignore[assignment]
    try:
        program.prepare(request)
    except BaseException as error:
        link.send({"broken": f"the row's setup code raises {type(error).__name__}: {error}"})
        os._exit(0)
    link.send({"broken": ""})  # before any line of the program runs
    with contextlib.suppress(Gone):
        link.send({"loaded": program.load(request["code"]), "names": program.names()})
        program.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
