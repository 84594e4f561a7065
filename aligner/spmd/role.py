"""`Role`: a model or a function on its ranks. A role call computes on member ranks and is skipped by all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from aligner.data.samples import Samples
from aligner.spmd import batch_ops
from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.rows import BatchRows
from aligner.spmd.transfer import learn_lengths, read
from aligner.spmd.world import World


@dataclass(frozen=True)
class Arguments:
    """Arguments of a role call, localised to this rank."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: BatchRows | None
    row_numbers: tuple[int, ...]
    """Of this rank's rows, in the whole batch."""


class Role:
    """Base class of policy, reference, rollout, reward and all other roles."""

    needs: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Role call -> parts of this role that must be on the device (default: all); see `aligner.spmd.residency`."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Calls that modify no part: host copies stay valid."""

    def __init__(self, name: str, world: World, mesh: Mesh, cost: Cost = TOKENS) -> None:
        self.name, self.world, self.mesh = name, world, mesh
        self.cost = cost
        """Cost of a row for this role, equal on every rank: rows are balanced by it."""
        self.member = world.rank in mesh.ranks
        self.shard = mesh.shard_of(world.rank)
        self.group = world.group(mesh.ranks)
        """Process group of this role's ranks; None elsewhere."""
        self.seconds: dict[str, float] = {}
        """Seconds in each call since it was last read (this rank)."""

    @contextmanager
    def call(self, method: str, also: Sequence[Role] = (), on_host: bool = False) -> Iterator[None]:
        """Context of one role call: recorded in every rank's journal, timed on members, with the needed parts in memory.

        Args:
            also: other roles that take part.
            on_host: it uses no memory of the roles on the device.
        """
        roles = (self, *also)
        takes_part = any(role.member for role in roles)
        call_name = f"{self.name}.{method}"
        self.world.journal.enter(call_name)
        start = time.perf_counter()
        span = self.world.timeline.span("call", call_name) if takes_part else nullcontext()
        with span, self.world.residency.call(roles, method, on_host):
            yield
        if self.member:
            self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - start

    def localize(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], minibatches: int = 1) -> Arguments:
        """Read every Ref among the arguments: this shard's rows on members, nothing elsewhere.

        Raises:
            ValueError: Refs of different batches in one call.
        """
        refs = [v for v in (*args, *kwargs.values()) if isinstance(v, Ref) and v.rows is not None]
        rows = refs[0].rows if refs else None
        if any(ref.rows is not rows for ref in refs):
            raise ValueError(f"{self.name} was given values of two different batches in one call; their rows differ.")
        row_numbers: tuple[int, ...] = ()

        def localized(value: Any) -> Any:
            nonlocal row_numbers
            if not isinstance(value, Ref):
                return value
            local, share = read(value, self, minibatches)
            row_numbers = share or row_numbers
            return local

        local_args = tuple(localized(value) for value in args)
        local_kwargs = {name: localized(value) for name, value in kwargs.items()}
        return Arguments(local_args, local_kwargs, rows, row_numbers)

    def map(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Apply a pure function to this role's rows; returns a Ref aligned with them.

        Args:
            function: gets this shard's rows of every Ref argument (whole groups, in order) and returns row-wise
                values: a tensor [B, ...], a list of B items or a dataclass of these. It must not modify its
                arguments in place: they are shared.
        """
        inner = getattr(function, "func", function)  # of a partial
        name = getattr(inner, "__name__", type(function).__name__)
        with self.call(f"map({name})", on_host=True):
            local = self.localize(args, kwargs)
            value = function(*local.args, **local.kwargs) if self.member else None
            return Ref(self, value, local.rows)

    def scatter(self, samples: Samples, group_size: int = 1, minibatches: int = 1) -> Ref:
        """Distribute a batch that every rank holds over this role's data-parallel ranks; returns a Ref.

        Args:
            group_size: consecutive rows that stay on one rank.
            minibatches: each of so many consecutive parts is balanced by itself.
        """
        lengths = samples.length_B.tolist()
        rows = BatchRows(group_size, set(range(self.world.size)), lengths)
        if not self.member:
            return Ref(self, None, rows, minibatches=minibatches)
        share = rows.shares(self.mesh.data, minibatches, self.cost)[self.shard or 0]
        value = batch_ops.fit_width(batch_ops.take(samples, share), max((lengths[row] for row in share), default=0))
        return Ref(self, value, rows, minibatches=minibatches)

    def scatter_like(self, like: Ref, value: Any) -> Ref:
        """Distribute a row-wise value that every rank holds (rows in global order) like the batch of `like`; returns a Ref."""
        rows = like.rows
        if rows is None:
            raise ValueError(
                "scatter_like() needs a row-wise Ref, such as samples; metrics have no rows to line up with."
            )
        learn_lengths(self.world, rows, self.mesh.ranks)
        if not self.member:
            return Ref(self, None, rows)
        share = rows.shares(self.mesh.data, cost=self.cost)[self.shard or 0]
        return Ref(self, batch_ops.take(value, share), rows)
