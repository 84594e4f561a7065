"""`Ref`: a value with a home. Only the home's ranks hold it; it moves when another role reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NoReturn

from aligner.spmd.partition import Shares
from aligner.spmd.rows import BatchRows
from aligner.spmd.transfer import Home, read_everywhere


@dataclass(frozen=True, eq=False)
class Ref:
    """What a role call returns: sharded by rows over the home's data-parallel shards, replicated over the rest.

    `ref.gather()` brings the value to every rank; `ref["field"]` is a Ref to one field of a dataclass or dict.
    """

    home: Home
    value: Any = field(default=None, repr=False)
    """This rank's shard on home ranks, None elsewhere."""
    rows: BatchRows | None = None
    """None for a value that is not row-wise (metrics): every home rank holds all of it."""
    fixed_shares: Shares | None = field(default=None, repr=False)
    """Rows of each shard where they are not `partition(lengths)`: a rollout replica holds what it sampled."""
    minibatches: int = 1
    read_cache: dict[Any, tuple[Any, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    """What roles have read of it, by (their shards, minibatches, cost): (value on this rank, global rows). The keys are the
    same on every rank."""
    _fields: dict[str, Ref] = field(default_factory=dict, repr=False)

    @property
    def shares(self) -> Shares:
        """Global row numbers of each home shard; needs the lengths."""
        if self.fixed_shares is not None:
            return self.fixed_shares
        assert self.rows is not None
        return self.rows.shares(self.home.mesh.data, self.minibatches, self.home.cost)

    def __getitem__(self, name: str) -> Ref:
        if not isinstance(name, str):
            raise TypeError(
                f"a Ref has fields, not positions: ref[{name!r}]. Use ref.gather() to bring the value here."
            )
        if name not in self._fields:
            value = _field(self.value, name) if self.home.member else None
            self._fields[name] = replace(self, value=value, read_cache={}, _fields={})
        field_ref = self._fields[name]
        for key, (value, rows) in self.read_cache.items():
            field_ref.read_cache.setdefault(key, (_field(value, name), rows))
        return field_ref

    def gather(self) -> Any:
        """The whole value, rows in global order, on every rank. A collective: every rank must call it."""
        return read_everywhere(self)

    def _refusal(self, operation: str) -> TypeError:
        return TypeError(
            f"{operation} of a Ref (home: {self.home.name}) would make ranks take different branches, since only its home "
            "ranks hold the value. Bring it to every rank first: ref.gather()."
        )

    def _no_tensor(self, operation: str) -> str:
        return (
            f"a Ref (home: {self.home.name}) has no {operation}: it is a value that only its home ranks hold. Bring the whole "
            f"value to every rank with ref.gather(), or compute on each shard where it is: "
            f"roles.{self.home.name}.map(function, ref)."
        )

    def __getattr__(self, name: str) -> NoReturn:
        # Python's own protocols (copy, pickle, numpy) ask for names of this form, and take "no" for an answer.
        if (name.startswith("__") and name.endswith("__")) or name in type(self).__dataclass_fields__:
            raise AttributeError(name)
        raise AttributeError(self._no_tensor(f"attribute {name!r}"))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> NoReturn:
        ref = next(ref for ref in _refs_in((args, kwargs or {})))
        name = getattr(function, "__name__", str(function))
        raise TypeError(ref._no_tensor(f"torch.{name}()" if not name.startswith("_") else f"{name}()"))

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._no_tensor("numpy array"))

    def _arithmetic(self, *_: Any) -> NoReturn:
        raise TypeError(self._no_tensor("arithmetic (+, -, *, /, ...)"))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _arithmetic
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _arithmetic
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _arithmetic
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _arithmetic

    def __setitem__(self, name: Any, value: Any) -> NoReturn:
        raise TypeError(self._no_tensor("item assignment"))

    def __bool__(self) -> bool:
        raise self._refusal("the truth value")

    def __len__(self) -> int:
        raise self._refusal("len()")

    def __iter__(self) -> NoReturn:
        raise self._refusal("iteration")

    def __float__(self) -> float:
        raise self._refusal("float()")

    def __int__(self) -> int:
        raise self._refusal("int()")

    def __index__(self) -> int:
        raise self._refusal("an index made")

    def __contains__(self, other: object) -> bool:
        raise self._refusal("a search in the items")

    def __eq__(self, other: object) -> bool:
        raise self._refusal("comparison")

    def __lt__(self, other: object) -> bool:
        raise self._refusal("comparison")

    __le__ = __gt__ = __ge__ = __ne__ = __lt__
    __hash__ = object.__hash__


def _field(value: Any, name: str) -> Any:
    """A field of a dict or dataclass; None where a rank holds nothing.

    Raises:
        LookupError: there is none of this name; those that there are, are named.
    """
    if value is None:
        return None
    names = list(value) if isinstance(value, dict) else [f.name for f in fields(value)] if is_dataclass(value) else []
    if name not in names:
        raise LookupError(f"ref[{name!r}]: a {type(value).__name__} has {', '.join(map(str, names)) or 'no fields'}.")
    return value[name] if isinstance(value, dict) else getattr(value, name)


def _refs_in(value: Any) -> Iterator[Ref]:
    """The Refs among a call's arguments, in lists and dicts too."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _refs_in(part)
