"""A transfer carried out in numpy by brute force: every rank works through its steps, and nothing is believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import as_strided

from aligner.reshard.plan.region import Box, Layout, Piece
from aligner.reshard.plan.schedule import STAGED, Message, Schedule, make_schedule
from aligner.reshard.plan.transfer_plan import Item, StreamKey, TransferPlan, plan_transfer
from tests.reshard.layouts import Shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Memory = dict[int, dict[str, np.ndarray]]


class Simulation:
    """All ranks' plans and memories; `run` transfers, and asserts all that is promised of plan and schedule."""

    def __init__(
        self, shapes: Shapes, sources: Mapping[int, Layout], destinations: Mapping[int, Layout], limit: int
    ) -> None:
        self.shapes, self.sources, self.destinations, self.limit = shapes, sources, destinations, limit
        self.values, self.held = _values(shapes), _blank(sources)
        for rank, layout in sources.items():
            for piece in layout:
                _view(self.held[rank], piece)[...] = self.values[piece.name][inside(piece)]
        ranks = sorted({*sources, *destinations})
        self.plans = {rank: plan_transfer(rank, sources, destinations) for rank in ranks}

    def run(self) -> dict[int, TransferPlan]:
        """With local copies spread evenly, and beside messages."""
        for beside in (False, True):
            self._run(beside)
        return self.plans

    def _run(self, beside: bool) -> None:
        self.filled, self.writes = _blank(self.destinations), _blank(self.destinations)
        self._transit: dict[int, dict[tuple[StreamKey, int], list[np.ndarray]]] = {rank: {} for rank in self.plans}
        self.schedules = {rank: make_schedule(plan, STAGED * self.limit, beside) for rank, plan in self.plans.items()}
        for rank, plan in self.plans.items():
            self._check_messages(rank, self.schedules[rank])
            self._check_beside(rank, self.schedules[rank], beside)
            for item in self._local(self.schedules[rank]):
                self._write(rank, item, _view(self.held[rank], item.source))
            least = self._least_bytes(rank)
            assert plan.minimum_bytes == self.schedules[rank].received_bytes == least
        self._deliver()
        self._check_result()

    def _local(self, schedule: Schedule) -> list[Item]:
        shares = [items for of_message in schedule.beside.values() for items in of_message.values()]
        return [item for items in (*schedule.local, *shares) for item in items]

    def _check_beside(self, rank: int, schedule: Schedule, beside: bool) -> None:
        """A rank's part of a tensor that it receives more of stands beside a message that brings some of it, and nothing else does."""
        received = {step.receive.content: schedule.items(step.receive) for step in schedule.steps if step.receive}
        names = {item.name for items in received.values() for item in items}
        assert not beside or names.isdisjoint(item.name for items in schedule.local for item in items)
        assert beside or not schedule.beside
        for content, of_message in schedule.beside.items():
            assert of_message.keys() <= {item.name for item in received[content]}
            assert all(item.name == name for name, items in of_message.items() for item in items)

    def _check_messages(self, rank: int, schedule: Schedule) -> None:
        """A rank's own steps: in the order of the labels, within the limit, no relay before its receipt."""
        labels = [message.label for step in schedule.steps for message in sorted(m for m in step if m)]
        assert labels == sorted(set(labels))
        for way in (0, 1):  # one each way in whatever ranks do at the same time
            ticks = Counter(step[way].label[:-1] for step in schedule.steps if step[way])  # type: ignore[union-attr]
            assert all(count == 1 for count in ticks.values())
        for buckets in (*schedule.buckets.values(), schedule.local):
            for items in buckets:
                size = sum(item.destination.elements * BYTES[item.destination.dtype] for item in items)
                assert 0 < size <= self.limit or (len(items) == 1 and items[0].destination.elements == 1)
        received: set[object] = set()
        for step in schedule.steps:
            if step.send and step.send.relay:
                assert step.send.content in received
            if step.receive:
                assert step.receive.content not in received
                received.add(step.receive.content)

    def _deliver(self) -> None:
        """A step ends when all its messages have met: then it must never come to a standstill."""
        steps = {rank: list(schedule.steps) for rank, schedule in self.schedules.items()}
        place = dict.fromkeys(steps, 0)
        sent: Counter[tuple[StreamKey, int]] = Counter()
        done: set[Message] = set()
        while open_ := {rank: steps[rank][place[rank]] for rank in steps if place[rank] < len(steps[rank])}:
            arriving = {step.receive for step in open_.values() if step.receive}
            met = [step.send for step in open_.values() if step.send in arriving and step.send not in done]
            for message in met:
                assert message is not None
                sent[message.content] += not message.relay
                self._carry(message)
            done |= {message for message in met if message}
            ready = [rank for rank, step in open_.items() if {m for m in step if m} <= done]
            assert ready, f"a standstill: {open_}"
            for rank in ready:
                place[rank] += 1
        for (key, _), count in sent.items():
            assert count == (1 if key.relayed else len(key.receivers))

    def _carry(self, message: Message) -> None:
        there, here = self.schedules[message.sender].items(message), self.schedules[message.receiver].items(message)
        assert [_travels(item) for item in there] == [_travels(item) for item in here]
        if message.relay:
            content = self._transit[message.sender][message.content]
        else:
            content = [_view(self.held[message.sender], item.source).copy() for item in there]
        assert message.content not in self._transit[message.receiver]
        self._transit[message.receiver][message.content] = content
        for item, values in zip(here, content, strict=True):
            self._write(message.receiver, item, values)

    def _write(self, rank: int, item: Item, values: np.ndarray) -> None:
        assert item.source.box == item.destination.box == Box(item.lo, item.size)
        _view(self.filled[rank], item.destination)[...] = values
        _view(self.writes[rank], item.destination)[...] += 1

    def _check_result(self) -> None:
        for rank, layout in self.destinations.items():
            for piece in layout:
                assert (_view(self.writes[rank], piece) == 1).all()
                assert (_view(self.filled[rank], piece) == self.values[piece.name][inside(piece)]).all()
            wanted = sum(piece.elements for piece in layout)
            assert sum(int(count.sum()) for count in self.writes[rank].values()) == wanted
        sent = sum(schedule.sent_bytes for schedule in self.schedules.values())
        assert sent == sum(plan.minimum_bytes for plan in self.plans.values())

    def _least_bytes(self, rank: int) -> int:
        """What `rank` wants and does not hold, counted element by element."""
        missing = 0
        for piece in self.destinations.get(rank, ()):
            held = np.zeros(self.shapes[piece.name], dtype=bool)
            for own in self.sources.get(rank, ()):
                if own.name == piece.name:
                    held[inside(own)] = True
            missing += int((~held[inside(piece)]).sum()) * BYTES[piece.dtype]
        return missing


def inside(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


def _travels(item: Item) -> tuple[object, ...]:
    return item.name, item.lo, item.size, item.destination.dtype


def _values(shapes: Shapes) -> dict[str, np.ndarray]:
    """Every element of every tensor has a value of its own."""
    values, start = {}, 1
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        values[name] = np.arange(start, start + count, dtype=np.float64).reshape(shape)
        start += count
    return values


def _view(memory: dict[str, np.ndarray], piece: Piece) -> np.ndarray:
    flat = memory[piece.storage]
    return as_strided(flat[piece.offset :], piece.size, [step * flat.itemsize for step in piece.stride])


def _blank(layouts: Mapping[int, Layout]) -> Memory:
    memory: Memory = {}
    for rank, layout in layouts.items():
        memory[rank] = {}
        for storage in {piece.storage for piece in layout}:
            pieces = [piece for piece in layout if piece.storage == storage]
            memory[rank][storage] = np.zeros(max(piece.offset + piece.elements for piece in pieces))
    return memory
