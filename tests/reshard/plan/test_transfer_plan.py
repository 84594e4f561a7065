"""Plans and schedules against a numpy simulation: each destination element once, right, and for the fewest bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.reshard.plan.layout import ExplicitLayout
from aligner.reshard.plan.region import Box, Layout, Piece, contiguous_stride, intersect, subtract, whole_tensor
from aligner.reshard.plan.schedule import make_schedule
from aligner.reshard.plan.transfer_plan import TransferPlan, natural, plan_transfer
from tests.reshard.layouts import Grid, Shapes, parts, scattered
from tests.reshard.simulation import Simulation

LIMITS = [4, 16, 64, 10_000]


def check(
    shapes: Shapes, sources: Mapping[int, Layout], destinations: Mapping[int, Layout], limit: int = 1 << 20
) -> dict[int, TransferPlan]:
    return Simulation(shapes, sources, destinations, limit).run()


shape_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
shapes_strategy = st.lists(shape_strategy, min_size=1, max_size=6).map(
    lambda found: {f"t{number}": shape for number, shape in enumerate(found)}
)
randoms = st.randoms(use_true_random=False)
many = settings(max_examples=200, deadline=None, derandomize=True)


@many
@given(shapes_strategy, randoms, st.data())
def test_grids_of_any_sizes_on_any_ranks(shapes: Shapes, draw: random.Random, data: st.DataObject) -> None:
    """Data x pipeline x tensor to replicas x tensor, on ranks that are disjoint, shared or overlapping."""
    sizes = st.integers(1, 3)
    tensor, pipeline, copies, to_tensor, replicas = (data.draw(sizes) for _ in range(5))
    world = tensor * pipeline * copies + to_tensor * replicas
    by = draw.sample(range(world), tensor * pipeline * copies)
    to = draw.sample(range(world), to_tensor * replicas)
    sources = Grid(by, tensor, pipeline).layouts(shapes, draw)
    destinations = Grid(to, to_tensor, 1, draw.choice(["float32", "bfloat16"])).layouts(shapes, draw)
    check(shapes, sources, destinations, limit=draw.choice(LIMITS))


@many
@given(shapes_strategy, randoms, st.integers(1, 3))
def test_boxes_that_overlap_freely(shapes: Shapes, draw: random.Random, copies: int) -> None:
    """Ranks hold the same regions in several forms, strides and data types, and want some of what they hold."""
    sources = scattered(shapes, range(4), "float32 bfloat16", draw, copies)
    destinations = parts(shapes, range(2, 6), "bfloat16 float32 float16", draw)
    check(shapes, sources, destinations, limit=draw.choice(LIMITS))


@many
@given(shapes_strategy, randoms, st.integers(1, 3), st.integers(1, 7))
def test_replicas_that_pass_on(shapes: Shapes, draw: random.Random, holders: int, replicas: int) -> None:
    """Few hold what many want, some of whom hold parts; one rank may want the same region twice."""
    everyone = range(holders + replicas)
    sources = scattered(shapes, draw.sample(everyone, holders), "float32", draw, 2)
    tensor = draw.choice([n for n in range(1, replicas + 1) if replicas % n == 0])
    to = draw.sample(everyone, replicas)
    destinations = Grid(to, tensor, 1, "bfloat16").layouts(shapes, draw)
    twice = draw.choice(to)
    again = [replace(piece, storage=f"again.{piece.storage}") for piece in destinations[twice]]
    destinations[twice] = [*destinations[twice], *again]
    check(shapes, sources, destinations, limit=draw.choice(LIMITS))


def test_replicas_share_the_sending_evenly() -> None:
    """One bucket in 64 KiB would be too small to share; 12 tensors of 128 KiB are not."""
    shapes = {f"layer{number}": (256, 128) for number in range(12)}
    sources = {rank: [whole_tensor(name, shape, "float32") for name, shape in shapes.items()] for rank in range(4)}
    destinations = {rank: sources[0] for rank in range(4, 7)}
    simulation = Simulation(shapes, sources, destinations, 1 << 20)
    simulation.run()
    sent = {simulation.schedules[rank].sent_bytes for rank in range(4)}
    assert sent == {3 * 12 * 256 * 128 * 4 // 4}


def test_more_replicas_than_holders_pass_on_what_they_get() -> None:
    """The one holder sends every byte once; each of 4 replicas passes its quarter on to the 3 others."""
    shapes = {"w": (256, 512)}
    whole = [whole_tensor("w", (256, 512), "float32")]
    simulation = Simulation(shapes, {5: whole}, dict.fromkeys(range(4), whole), 1 << 20)
    simulation.run()
    size = 256 * 512 * 4
    assert [simulation.schedules[rank].sent_bytes for rank in (5, 0, 1, 2, 3)] == [size, *[3 * size // 4] * 4]
    assert simulation.schedules[5].relayed_bytes == 0
    assert simulation.schedules[0].relayed_bytes == simulation.schedules[0].sent_bytes


def test_as_many_holders_as_replicas_send_directly() -> None:
    whole = [whole_tensor("w", (256, 512), "float32")]
    simulation = Simulation({"w": (256, 512)}, dict.fromkeys((4, 5), whole), dict.fromkeys((0, 1), whole), 1 << 20)
    simulation.run()
    assert [simulation.schedules[rank].sent_bytes for rank in (4, 5, 0, 1)] == [256 * 512 * 4] * 2 + [0, 0]


def test_a_region_already_there_does_not_travel() -> None:
    whole = whole_tensor("w", (4, 4), "float32")
    half = Piece("w", (0, 0), (2, 4), "w", 0, (4, 1), "float32")
    plans = check({"w": (4, 4)}, {0: [whole], 1: [half]}, {1: [whole]})
    assert plans[1].minimum_bytes == 2 * 4 * 4
    assert [item.lo for item in plans[1].local] == [(0, 0)]
    assert [item.lo for stream in plans[1].streams for item in stream.items] == [(2, 0)]


def test_two_stages_that_hold_a_tied_embedding_share_its_sending() -> None:
    first = whole_tensor("embedding", (256, 512), "float32")
    last = replace(first, storage="output_layer.weight")
    simulation = Simulation({"embedding": (256, 512)}, {0: [first], 1: [last]}, {2: [first], 3: [first]}, 1 << 20)
    simulation.run()
    assert simulation.schedules[0].sent_bytes == simulation.schedules[1].sent_bytes == 256 * 512 * 4


def test_modules_complete_in_natural_order() -> None:
    names = [f"layers.{number}.{part}" for number in (2, 10, 9) for part in ("w", "b")]
    layout = [whole_tensor(name, (4,), "float32") for name in names]
    (stream,) = plan_transfer(1, {0: layout}, {1: layout[::-1]}).streams
    assert [item.name for item in stream.items] == [f"layers.{n}.{part}" for n in (2, 9, 10) for part in ("b", "w")]
    assert natural("layers.9.w") < natural("layers.10.b")


def test_scalars_travel() -> None:
    check({"scale": ()}, {0: [whole_tensor("scale", (), "float32")]}, {1: [whole_tensor("scale", (), "float32")]}, 4)


def test_unknown_tensor_is_named() -> None:
    have, want = [whole_tensor("a", (2,), "float32")], [whole_tensor("lm_head.weight", (2,), "float32")]
    with pytest.raises(ValueError, match=r"lm_head\.weight, wanted by rank 1 .* held by no source rank.*model\.path"):
        plan_transfer(1, {0: have}, {1: want})


@pytest.mark.parametrize("rank", [0, 1])
def test_uncovered_region_is_named_at_both_ends(rank: int) -> None:
    held = Piece("a", (0, 0), (3, 2), "a", 0, (2, 1), "float32")
    with pytest.raises(ValueError, match=r"region \[3:4, 0:2\] of tensor a, wanted by rank 1"):
        plan_transfer(rank, {0: [held]}, {1: [whole_tensor("a", (4, 2), "float32")]})


@pytest.mark.parametrize("rank", [0, 1])
def test_dimensions_must_agree(rank: int) -> None:
    with pytest.raises(ValueError, match="tensor a has 1 dimensions at the source and 2"):
        plan_transfer(rank, {0: [whole_tensor("a", (4,), "float32")]}, {1: [whole_tensor("a", (2, 2), "float32")]})


def test_ranks_without_a_part_have_an_empty_plan() -> None:
    piece = whole_tensor("a", (4,), "float32")
    plan = plan_transfer(7, {0: [piece]}, {1: [piece]})
    assert not (plan.local or plan.streams or plan.minimum_bytes or make_schedule(plan, 1 << 20).steps)


def test_a_plan_asks_only_for_its_own_tensors() -> None:
    """What a rank neither holds nor wants is not looked at: the cost follows its own pieces."""

    class Counting(ExplicitLayout):
        asked: ClassVar[set[str]] = set()

        def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
            self.asked.add(name)
            return super().holders(name)

    layers = {rank: [whole_tensor(f"layer{rank}", (8,), "float32")] for rank in range(8)}
    plan_transfer(3, Counting(layers), Counting({8: [piece for layout in layers.values() for piece in layout]}))
    assert Counting.asked == {"layer3"}


@given(st.data())
def test_intersection_and_rest_make_up_the_box(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    corner = st.tuples(*[st.integers(0, 4)] * dims)
    extent = st.tuples(*[st.integers(1, 4)] * dims)
    a, b = Box(data.draw(corner), data.draw(extent)), Box(data.draw(corner), data.draw(extent))
    cells_a, cells_b = np.zeros((8,) * dims), np.zeros((8,) * dims)
    cells_a[tuple(slice(x, x + n) for x, n in zip(*a, strict=True))] = 1
    cells_b[tuple(slice(x, x + n) for x, n in zip(*b, strict=True))] = 1
    common = intersect(a, b)
    assert (common.elements if common else 0) == int((cells_a * cells_b).sum())
    if common:
        for rest in subtract(a, common):
            cells_a[tuple(slice(x, x + n) for x, n in zip(*rest, strict=True))] -= 1
        assert (cells_a == cells_a * cells_b).all()


def test_contiguous_strides() -> None:
    assert contiguous_stride((2, 3, 4)) == tuple(step // 8 for step in np.zeros((2, 3, 4)).strides)


def test_planning_time_grows_with_the_number_of_pieces() -> None:
    """16 times the tensors on the same ranks: about 16 times the work, where all pairs would take 256 times."""

    def seconds(tensors: int) -> float:
        shapes = {f"t{number}": (64, 64) for number in range(tensors)}
        draw = random.Random(0)
        sources = ExplicitLayout(Grid(range(8), 4, 1).layouts(shapes, draw))
        destinations = ExplicitLayout(Grid(range(8, 16), 2, 1).layouts(shapes, draw))
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            plan_transfer(0, sources, destinations)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(1600) < 64 * seconds(100)
