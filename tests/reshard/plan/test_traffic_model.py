"""The account of all ranks, from a few plans, against every rank's own schedule."""

from __future__ import annotations

import random

import pytest

from aligner.reshard.plan.layout import ExplicitLayout
from aligner.reshard.plan.region import whole_tensor
from aligner.reshard.plan.schedule import make_schedule
from aligner.reshard.plan.traffic_model import make_traffic_model
from aligner.reshard.plan.transfer_plan import plan_transfer
from tests.reshard.layouts import Grid

SHAPES = {**{f"layer{n}.w": (60, 48) for n in range(6)}, "norm": (48,), "scale": ()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_equals_every_rank_planned_for_itself(seed: int, shared: bool) -> None:
    draw = random.Random(seed)
    source = ExplicitLayout(Grid(range(8), draw.choice([1, 2, 4]), draw.choice([1, 2])).layouts(SHAPES, draw))
    first = 0 if shared else 8
    destination = ExplicitLayout(Grid(range(first, first + 12), draw.choice([1, 2, 3]), 1).layouts(SHAPES, draw))
    account = make_traffic_model(source, destination, SHAPES, 6000)
    for rank, load in account.loads.items():
        plan = plan_transfer(rank, source, destination)
        schedule = make_schedule(plan, 6000)
        assert (load.out, load.relayed) == (schedule.sent_bytes, schedule.relayed_bytes)
        assert (load.received, load.local) == (schedule.received_bytes, plan.local_bytes)


def test_replicas_are_planned_once() -> None:
    layout = [whole_tensor("w", (64,), "float32")]
    account = make_traffic_model(
        ExplicitLayout({0: layout}), ExplicitLayout(dict.fromkeys(range(1, 100), layout)), ["w"], 1 << 20
    )
    assert len(account.planning_seconds) == 1 and len(account.loads) == 100


def test_what_only_few_ranks_hold_bounds_the_balance() -> None:
    """Rank 0 alone holds 300 of 400 elements: no plan lets it send less than those."""
    big, small = whole_tensor("big", (300,), "float32"), whole_tensor("small", (100,), "float32")
    account = make_traffic_model(
        ExplicitLayout({0: [big, small], 1: [small]}), ExplicitLayout({2: [big, small]}), ["big", "small"], 1 << 20
    )
    assert account.heaviest_lower_bound == 1200
