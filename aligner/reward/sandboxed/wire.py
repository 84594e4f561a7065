"""Wire format between the tests and the program: plain data by value, objects that belong to one side by reference.

A message is JSON: atoms as they are, everything else as a node in its table `nodes`, referred to by [index]; [-1 - index]
refers to a node of the request being answered. This preserves shared and cyclic structures.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

ATOMS = (type(None), bool, int, float, str)
CALLED: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "complex": ("builtins", lambda x: (x.real, x.imag)),
    "range": ("builtins", lambda x: (x.start, x.stop, x.step)),
    "slice": ("builtins", lambda x: (x.start, x.stop, x.step)),
    "Decimal": ("decimal", lambda x: (str(x),)),
    "Fraction": ("fractions", lambda x: (x.numerator, x.denominator)),
    "date": ("datetime", lambda x: (x.year, x.month, x.day)),
    "time": ("datetime", lambda x: (x.hour, x.minute, x.second, x.microsecond)),
    "datetime": ("datetime", lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond)),
    "timedelta": ("datetime", lambda x: (x.days, x.seconds, x.microseconds)),
}
"""Type name -> (module, function to the constructor arguments) for immutable values."""
SEQUENCES = {"tuple": tuple, "frozenset": frozenset}
MUTABLE = ("list", "dict", "set", "deque", "bytearray", "OrderedDict", "defaultdict", "Counter", "instance")
DEEP = 400_000
COMPARISONS, UNARY = ("lt", "le", "gt", "ge"), ("neg", "pos", "abs", "invert")
BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
"""Operators that can be requested, by their names in the module `operator`."""


class Gone(Exception):
    """The other side has ended."""


class Foreign(Exception):
    """A value that cannot be represented on the other side."""


class Link:
    """Length-prefixed JSON both ways over a socket."""

    def __init__(self, number: int) -> None:
        sys.set_int_max_str_digits(0)
        os.set_inheritable(number, False)
        self._number = number
        self._come = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises Gone."""
        text = json.dumps(message).encode()
        rest = memoryview(len(text).to_bytes(8, "big") + text)
        try:
            while rest:
                rest = rest[os.write(self._number, rest) :]
        except OSError:
            raise Gone from None

    def receive(self) -> dict[str, Any]:
        """Receive one message. Raises Gone."""
        try:
            message = json.loads(self._read(int.from_bytes(self._read(8), "big")))
        except (OSError, ValueError, MemoryError, OverflowError, RecursionError):
            raise Gone from None
        if not isinstance(message, dict):
            raise Gone
        return message

    def _read(self, size: int) -> bytes:
        while len(self._come) < size:
            part = os.read(self._number, max(65536, size - len(self._come)))
            if not part:
                raise Gone
            self._come += part
        data, self._come = bytes(self._come[:size]), self._come[size:]
        return data


class Endpoint:
    """One end of the connection: encodes objects that belong to it. This base class supports plain data only."""

    def foreign(self, thing: Any, pack: Pack) -> list[Any]:
        """Encode a value that is not plain data. Raises Foreign if the other side cannot represent it."""
        raise Foreign(f"an object of type {type(thing).__name__}")

    def native(self, node: list[Any], unpack: Unpack) -> Any:
        """Decode such a node from the other side. Raises Foreign if it has no meaning here."""
        raise Foreign(f"a value of kind {node[0]}")

    def fill(self, thing: Any, state: Any) -> None:
        """Set the attributes of an instance."""
        for name, value in state:
            if isinstance(name, str) and not name.startswith("__"):
                object.__setattr__(thing, name, value)


class Pack:
    """Encodes values into one table of nodes."""

    def __init__(self, side: Endpoint, request: Unpack | None = None) -> None:
        """Args: request: the decoded request that is being answered, whose nodes can be referred to."""
        self.nodes: list[Any] = []
        self._side = side
        self.held: dict[int, Any] = {}
        """Keeps encoded objects alive, so that no id is reused."""
        self._index: dict[int, int] = {}
        if request is not None:
            for number, thing in request.built.items():
                self._index[id(thing)] = -1 - number
                self.held[-1 - number] = thing

    def value(self, thing: Any) -> Any:
        """An atom, or [index]."""
        if type(thing) in ATOMS:
            return thing
        index = self._index.get(id(thing))
        if index is None:
            index = self._index[id(thing)] = len(self.nodes)
            self.held[index] = thing
            self.nodes.append(None)
            self.nodes[index] = self.node(thing)
        return [index]

    def node(self, thing: Any) -> list[Any]:
        """[tag, ...]: the node with the value's content."""
        kind = type(thing)
        if kind in (list, tuple, set, frozenset):
            return [kind.__name__, [self.value(item) for item in thing]]
        if kind in (dict, collections.OrderedDict, collections.Counter):
            return [kind.__name__, self._pairs(thing)]
        if kind is collections.defaultdict:
            return ["defaultdict", self._pairs(thing), self.value(thing.default_factory)]
        if kind in (bytes, bytearray):
            return [kind.__name__, thing.decode("latin-1")]
        if kind is collections.deque:
            return ["deque", [self.value(item) for item in thing], thing.maxlen]
        module, parts = CALLED.get(kind.__name__, ("", None))
        if parts and kind.__module__ == module and getattr(thing, "tzinfo", None) is None:
            return [kind.__name__, [self.value(part) for part in parts(thing)]]
        if thing is Ellipsis or thing is NotImplemented:
            return ["single", repr(thing)]
        return self._side.foreign(thing, self)

    def _pairs(self, thing: Any) -> list[Any]:
        return [[self.value(key), self.value(value)] for key, value in dict.items(thing)]


class Unpack:
    """Decodes a table of nodes into values."""

    def __init__(self, side: Endpoint, nodes: list[Any], request: Pack | None = None) -> None:
        """Args: request: the encoded request whose answer this is, to which its nodes may refer."""
        self.nodes, self._side, self._request = nodes, side, request
        self.built: dict[int, Any] = {}

    def value(self, packed: Any) -> Any:
        """Decode an atom or [index]."""
        if type(packed) is not list:
            return packed
        index = packed[0]
        if index < 0:
            assert self._request is not None
            return self._request.held[-1 - index]
        if index not in self.built:
            self._build(index)
        return self.built[index]

    def _build(self, index: int) -> None:
        node = self.nodes[index]
        tag = node[0]
        empty = self._empty(node)
        if empty is not None:
            self.built[index] = empty
            self.refill(empty, node)
        elif tag in SEQUENCES:
            self.built[index] = SEQUENCES[tag]([self.value(item) for item in node[1]])
        elif tag in CALLED:
            kind = getattr(importlib.import_module(CALLED[tag][0]), tag)
            self.built[index] = kind(*[self.value(part) for part in node[1]])
        elif tag == "bytes":
            self.built[index] = node[1].encode("latin-1")
        elif tag == "single":
            self.built[index] = Ellipsis if node[1] == "Ellipsis" else NotImplemented
        else:
            self.built[index] = self._side.native(node, self)

    def _empty(self, node: list[Any]) -> Any:
        tag = node[0]
        if tag == "instance":
            return self._side.native(node, self)
        if tag == "deque":
            return collections.deque(maxlen=node[2])
        if tag == "defaultdict":
            return collections.defaultdict(self.value(node[2]))
        kinds = {"list": list, "dict": dict, "set": set, "bytearray": bytearray}
        kinds |= {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
        return kinds[tag]() if tag in kinds else None

    def refill(self, thing: Any, node: list[Any]) -> None:
        """Set the content of a mutable object from a node."""
        tag = node[0]
        if tag == "instance":
            self._side.fill(thing, [(name, self.value(value)) for name, value in node[2]])
        elif tag == "bytearray":
            thing[:] = node[1].encode("latin-1")
        elif tag == "list":
            thing[:] = [self.value(item) for item in node[1]]
        elif tag in ("set", "deque"):
            items = [self.value(item) for item in node[1]]
            thing.clear()
            (thing.update if tag == "set" else thing.extend)(items)
        else:
            pairs = [(self.value(key), self.value(value)) for key, value in node[1]]
            thing.clear()
            for key, value in pairs:
                thing[key] = value


def state_of(thing: Any) -> list[tuple[str, Any]]:
    """The attributes of an instance, including slots."""
    slots = [name for kind in type(thing).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    attributes = [(name, getattr(thing, name)) for name in slots if name != "__dict__" and hasattr(thing, name)]
    return attributes + list(getattr(thing, "__dict__", {}).items())


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def base_of(thing: Any) -> Any:
    """The builtin value of an object whose class derives from a builtin type; raises Foreign if it does not."""
    if isinstance(thing, int):
        return int.__int__(thing)
    if isinstance(thing, float):
        return float.__float__(thing)
    if isinstance(thing, str):
        return str.__getitem__(thing, slice(None))
    if isinstance(thing, bytes):
        return bytes.__getitem__(thing, slice(None))
    if isinstance(thing, tuple):
        return tuple(tuple.__iter__(thing))
    if isinstance(thing, list):
        return list(list.__iter__(thing))
    if isinstance(thing, set):
        return set(set.__iter__(thing))
    if isinstance(thing, frozenset):
        return frozenset(frozenset.__iter__(thing))
    if isinstance(thing, dict):
        return dict(dict.items(thing))
    raise Foreign(f"an object of type {type(thing).__name__}")
