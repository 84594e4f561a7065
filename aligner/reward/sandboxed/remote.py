"""The tests' side of the socket: proxies of the program's objects.

A proxy is never equal to a plain value and does not compute with one, whatever methods its class has: an object that
claims to be equal to everything, or at distance 0 from every number, cannot pass for a number.
"""

from __future__ import annotations

import builtins
import importlib
import json
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from wire import BINARY, COMPARISONS, DEEP, MUTABLE, UNARY, Endpoint, Gone, Link, Pack, Unpack, state_of

KINDS: dict[str, Any] = {"generator": types.GeneratorType, "type": type}
KINDS |= {kind.__name__: kind for kind in (map, filter, zip, enumerate, reversed, object)}
KEPT, WATCHED = 16, 1000
"""Number of the program's containers that are watched for changes, and the most items in each."""
MOST = 1_000_000
"""Most items that are searched for `x in y` on an object of the program."""


class FaultyTests(BaseException):
    """The tests are at fault or need something unsupported, so there is no verdict on the program."""


_set = object.__setattr__


class Proxy:
    # Proxy of an object of the program. (A docstring would become every object's __doc__.)

    def __init__(self, judge: HarnessEndpoint, number: int, flags: dict[str, Any]) -> None:
        _set(self, "_judge", judge)
        _set(self, "_number", number)
        _set(self, "_flags", flags)
        _set(self, "_named", "")  # the program's name by which the tests got it
        _set(self, "_made", False)  # the result of calling a capitalised name: the tests use it as an object

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._judge.do("call", self, *args, **kwargs)
        if isinstance(result, Proxy) and self._named[:1].isupper():
            _set(result, "_made", True)
        return result

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":  # asked for by inspect.signature
            raise self._judge.fault("the tests look into the program's code")
        if name in ("__code__", "__globals__"):
            raise AttributeError(name)
        value = self._judge.do("getattr", self, name)
        if isinstance(value, Proxy) and self._named != "Solution":
            _set(value, "_named", self._named)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.do("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._judge.do("delattr", self, name)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Proxy | Extended):
            return self is other or bool(self._judge.do("eq", self, other))
        if self._flags.get("plain"):
            return self._judge.do("plain", self) == other
        return NotImplemented

    def __ne__(self, other: object) -> Any:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __contains__(self, item: Any) -> bool:
        if self._made:
            return bool(self._judge.do("contains", self, item))
        return any(item == other for other, _ in zip(self, range(MOST), strict=False))

    def __enter__(self) -> Any:
        return self._judge.do("enter", self)

    def __exit__(self, *error: Any) -> Any:
        return self._judge.do("exit", self)

    def __instancecheck__(self, thing: Any) -> bool:
        return bool(self._judge.do("isinstance", thing, self))

    def __subclasscheck__(self, kind: Any) -> bool:
        return bool(self._judge.do("issubclass", kind, self))

    def __mro_entries__(self, bases: Any) -> Any:
        raise self._judge.fault("the tests extend a class of the program")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return KINDS.get(self._flags.get("kind", ""), Proxy)


class Awaitable(Proxy):
    # Proxy of a coroutine of the program.

    def __await__(self) -> Any:
        return self._judge.do("await", self)
        yield


class Extended:
    """Mixin for values of the program's classes that derive from a builtin type; the value itself is a local copy."""

    def __getattr__(self, name: str) -> Any:
        judge = self.__dict__.get("_judge")
        if judge is None or name.startswith("_"):
            raise AttributeError(name)
        return judge.do("getattr", self, name)


def _forward(name: str) -> Any:
    return lambda self, *args: self._judge.do(name, self, *args)


def _compute(name: str, swapped: bool = False) -> Any:
    def operation(self: Proxy, *others: Any) -> Any:
        if not self._made and not all(isinstance(other, Proxy) for other in others):
            return NotImplemented
        result = self._judge.do(name, *((*others, self) if swapped else (self, *others)))
        if isinstance(result, Proxy) and self._made:
            _set(result, "_made", True)
        return result

    return operation


for name in ("len", "iter", "next", "repr", "str", "hash", "bool", "dir", "reversed", "getitem", "setitem", "delitem"):
    setattr(Proxy, f"__{name}__", _forward(name))
for name in (*COMPARISONS, *UNARY):
    setattr(Proxy, f"__{name}__", _compute(name))
for name in BINARY:
    plain = name.removesuffix("_")
    setattr(Proxy, f"__{plain}__", _compute(name))
    setattr(Proxy, f"__r{plain}__", _compute(name, swapped=True))
Proxy.__doc__ = property(lambda self: self._judge.do("getattr", self, "__doc__"))  # type: ignore[assignment]
EXTENDED: dict[type, Any] = {
    base: type(base.__name__, (Extended, base), {"__hash__": base.__hash__})
    for base in (int, float, str, bytes, tuple, frozenset, list, dict, set)
}


class HarnessEndpoint(Endpoint):
    """Sends requests to the program and answers its requests in between."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.RLock()
        self._proxies: dict[int, Any] = {}
        self._things: list[Any] = []
        self._raised: list[BaseException] = []
        self._module: Any = None
        self.names: list[str] = []
        self.shared: Callable[[str], Any] = lambda name: None
        """Name -> class that both sides have; its instances are passed by value."""
        self._held: list[tuple[Any, int, str]] = []
        """Containers obtained from the program, with their last known content: changes must be sent to the program."""
        self.used, self.broken = 0, ""

    def hello(self) -> list[str] | None:
        """The program's names; None if it does not load.

        Raises:
            FaultyTests: the setup fails.
            Gone: the program has ended.
        """
        broken = self._link.receive()["broken"]  # sent before the program ran, so it cannot be forged
        if broken:
            raise FaultyTests(broken)
        reply = self._link.receive()
        names = reply.get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Gone
        return names if reply.get("loaded") is True else None

    def install(self, names: list[str], modules: list[str]) -> None:
        """Let the tests import the program by any of these module names."""
        self.names = names
        self._module = self.do("module")
        for name in modules:
            sys.modules[name] = self._stand_in(name)

    def _stand_in(self, name: str) -> types.ModuleType:
        judge = self

        class Module(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name == "__all__":
                    return judge.names
                if name.startswith("__") or name not in judge.names:
                    raise AttributeError(f"the solution has no {name}")
                value = judge.fetch(name)
                judge.used += not isinstance(value, Proxy | type)
                return value

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(judge._module, name, value)

        return Module(name)

    def fetch(self, name: str) -> Any:
        """The program's object of this name."""
        if self._module is None:
            self._module = self._ask("module", (), {})
        value = self._ask("getattr", (self._module, name), {})
        if isinstance(value, Proxy):
            _set(value, "_named", name)
        return value

    def do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Execute an operation on the program's side, and count it as a use of the program."""
        if operation != "module":
            self.used += 1
        return self._ask(operation, args, kwargs)

    def fault(self, why: str) -> FaultyTests:
        """An exception to raise; also recorded, because a test may catch everything."""
        self.broken = self.broken or why
        return FaultyTests(why)

    def raised(self, error: BaseException) -> bool:
        """Whether the exception comes from the program."""
        return any(error is known for known in self._raised)

    def _ask(self, operation: str, args: Any, kwargs: Any) -> Any:
        with self._lock:  # the tests may have threads
            return self._asked_for(operation, args, kwargs)

    def _asked_for(self, operation: str, args: Any, kwargs: Any) -> Any:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(DEEP)
        pack = Pack(self)
        filled = self._changed(pack) if self._held else []
        given = {name: pack.value(value) for name, value in kwargs.items()}
        request = {"op": operation, "args": [pack.value(arg) for arg in args], "kwargs": given, "filled": filled}
        sys.setrecursionlimit(limit)
        self._link.send({**request, "nodes": pack.nodes})
        while True:
            reply = self._link.receive()
            if "ask" not in reply:
                return self._taken(reply, pack)
            self._link.send(self._answer(reply))

    def _changed(self, pack: Pack) -> list[Any]:
        changes = []
        for index, (thing, number, before) in enumerate(self._held):
            now = self._content(thing)
            if now != before:
                changes.append([number, pack.value(thing)])
                self._held[index] = (thing, number, now)
        return changes

    def _content(self, thing: Any) -> str:
        pack = Pack(self)
        return json.dumps([pack.value(thing), pack.nodes])

    def _taken(self, reply: dict[str, Any], pack: Pack) -> Any:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(DEEP)
        try:
            unpack = Unpack(self, reply["nodes"], pack)
            for index, node in reply["after"].items():
                if pack.nodes[int(index)][0] != node[0] or node[0] not in MUTABLE:
                    raise Gone
                unpack.refill(pack.held[int(index)], node)
            value = unpack.value(reply["value"])
            if "held" in reply and len(value) <= WATCHED:
                self._held = [*self._held[1 - KEPT :], (value, reply["held"], self._content(value))]
            printed = str(reply["printed"])
        except (Gone, FaultyTests):
            raise
        except Exception:  # a forged reply counts as none
            raise Gone from None
        finally:
            sys.setrecursionlimit(limit)
        if printed:
            sys.stdout.write(printed)
        if reply.get("raised"):
            raise self._error(value)
        return value

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            unpack = Unpack(self, asked["nodes"])
            args, kwargs = unpack.value(asked["args"]), unpack.value(asked["kwargs"])
            value = self._asked(asked["ask"], asked["thing"], args, kwargs)
        except (FaultyTests, Gone):
            raise
        except BaseException as error:
            return {"raise": [type(error).__name__, str(error)]}
        pack = Pack(self, unpack)
        return {"value": pack.value(value), "nodes": pack.nodes}

    def _asked(self, what: str, number: int, args: Any, kwargs: Any) -> Any:
        if what == "input":
            return builtins.input(*args)
        if what == "readline":
            return sys.stdin.readline()
        if what == "getattr":
            if args[0].startswith("_"):
                raise AttributeError(args[0])
            return getattr(self._things[number], args[0])
        return self._things[number](*args, **kwargs)

    def _error(self, content: Any) -> BaseException:
        """Rebuild an exception of the program, of a class that the tests can name."""
        kinds, args, state = content
        classes = [
            self._proxies.get(number) or (getattr(builtins, name, None) if own else None) for name, own, number in kinds
        ]
        kind = next((kind for kind in classes if isinstance(kind, type) and issubclass(kind, BaseException)), Exception)
        try:
            error = kind(*args)
            error.__dict__.update({name: value for name, value in state if isinstance(name, str)})
        except Exception:
            error = RuntimeError(*args)
        self._raised.append(error)
        return error

    def foreign(self, thing: Any, pack: Pack) -> list[Any]:
        """Encode a value that is not plain data; see `Endpoint.foreign`."""
        if isinstance(thing, Proxy | Extended):
            return ["thing", object.__getattribute__(thing, "_number")]
        if isinstance(thing, type) and (number := vars(thing).get("_number")) is not None:
            return ["thing", number]
        if isinstance(thing, type) and self.shared(thing.__name__) is thing:
            return ["global", "", thing.__name__]
        if self.shared(type(thing).__name__) is type(thing):
            return ["instance", type(thing).__name__, [[name, pack.value(value)] for name, value in state_of(thing)]]
        if (place := _place(thing)) is not None:
            return ["global", *place]
        self._things.append(thing)
        about = {name: text for name in ("__name__", "__doc__") if isinstance(text := getattr(thing, name, None), str)}
        return ["tests", len(self._things) - 1, about]

    def native(self, node: list[Any], unpack: Unpack) -> Any:
        """Decode a node from the program; see `Endpoint.native`."""
        tag = node[0]
        if tag == "tests":
            return self._things[node[1]]
        if tag == "builtin":
            return getattr(builtins, node[1])
        if tag == "instance":
            return object.__new__(self.shared(node[1]) or types.SimpleNamespace)
        number = node[1]
        if number in self._proxies:
            return self._proxies[number]
        if tag == "extended":
            plain = unpack.value(node[2])
            value = EXTENDED[type(plain)](plain)
            value.__dict__.update(_judge=self, _number=number)
            return value  # not kept: its value may be another the next time
        if tag == "exception":
            self._proxies[number] = self._mirror(*node[1:])
        else:
            kind = Awaitable if node[2].get("await") else Proxy
            self._proxies[number] = kind(self, number, node[2])
        return self._proxies[number]

    def _mirror(self, number: int, name: str, bases: list[int], builtin: list[str]) -> type:
        """A local class for an exception class of the program, to be named in `except`."""
        classes = [
            self._proxies.get(base) or getattr(builtins, own, None) for base, own in zip(bases, builtin, strict=True)
        ]
        base = next((kind for kind in classes if isinstance(kind, type)), Exception)
        return type(name, (base,), {"_number": number})


def _place(thing: Any) -> tuple[str, str] | None:
    """(module, name) of a function or class of the standard library; None for others."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(name, str) or not isinstance(module, str) or module.split(".")[0] not in sys.stdlib_module_names:
        return None
    value: Any = importlib.import_module(module) if module in sys.modules else None
    for part in name.split("."):
        value = getattr(value, part, None)
    return (module, name) if value is thing else None
