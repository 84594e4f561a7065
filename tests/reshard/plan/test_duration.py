"""How long a schedule takes, by hand; and that transfers with enough to send keep the links busy."""

from __future__ import annotations

import random

import pytest

from aligner.reshard.plan.duration import schedule_seconds
from aligner.reshard.plan.region import Layout, whole_tensor
from aligner.reshard.plan.schedule import Schedule, make_schedule
from aligner.reshard.plan.transfer_plan import plan_transfer
from tests.reshard.layouts import Grid

SIZE = 3 << 20


def schedules(source: dict[int, Layout], destination: dict[int, Layout], staging: int) -> dict[int, Schedule]:
    ranks = sorted({*source, *destination})
    return {rank: make_schedule(plan_transfer(rank, source, destination), staging) for rank in ranks}


def test_one_message_takes_its_latency_and_its_bytes() -> None:
    layout = [whole_tensor("w", (SIZE // 4,), "float32")]
    found = schedules({0: layout}, {1: layout}, 30 << 20)
    messages = len(found[0].steps)
    assert schedule_seconds(found, SIZE, 0.25) == pytest.approx(1.0 + 0.25 * messages)
    assert schedule_seconds(found, 2 * SIZE, 0.0) == pytest.approx(0.5)
    assert schedule_seconds({0: found[0], 1: found[1], 2: Schedule((), {}, ())}, SIZE, 0.0) == pytest.approx(1.0)


def test_two_that_exchange_do_it_at_once_and_two_senders_to_one_take_turns() -> None:
    a, b = ([whole_tensor(name, (SIZE // 4,), "float32")] for name in "ab")
    assert schedule_seconds(schedules({0: a, 1: b}, {0: b, 1: a}, 30 << 20), SIZE, 0.0) == pytest.approx(1.0)
    assert schedule_seconds(schedules({0: a, 1: b}, {2: [*a, *b]}, 30 << 20), SIZE, 0.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "to_tensor", "first"), [(4, 1, 2, 0), (8, 1, 4, 0), (4, 2, 4, 0), (4, 2, 2, 8)]
)
def test_the_links_are_busy(tensor: int, pipeline: int, to_tensor: int, first: int) -> None:
    """Colocated and disjoint: at least three quarters of the time the busiest link carries something."""
    shapes = {f"layer{n}.w": (512, 512) for n in range(8)}
    draw = random.Random(0)
    source = Grid(range(8), tensor, pipeline).layouts(shapes, draw)
    destination = Grid(range(first, first + 8), to_tensor, 1).layouts(shapes, draw)
    found = schedules(source, destination, 512 << 10)
    least = max(max(one.sent_bytes, one.received_bytes) for one in found.values())
    assert schedule_seconds(found, 1.0, 0.0) <= least / 0.75
