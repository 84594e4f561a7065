"""Plans against a numpy simulation: every destination element once, with the right value, for the fewest bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from aligner.reshard.plan import Plan, buckets, make_plan
from aligner.reshard.region import Box, Layout, Piece, contiguous_stride, intersect, subtract, whole_tensor
from tests.reshard.layouts import Grid, Shapes, parts, scattered

Memory = dict[int, dict[str, np.ndarray]]


def reference_values(shapes: Shapes) -> dict[str, np.ndarray]:
    """Every element of every tensor has a value of its own."""
    values, start = {}, 1
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        values[name] = np.arange(start, start + count, dtype=np.float64).reshape(shape)
        start += count
    return values


def numpy_view(memory: dict[str, np.ndarray], piece: Piece) -> np.ndarray:
    flat = memory[piece.storage]
    return as_strided(flat[piece.offset :], piece.size, [step * flat.itemsize for step in piece.stride])


def blank(layouts: Mapping[int, Layout]) -> Memory:
    memory: Memory = {}
    for rank, layout in layouts.items():
        memory[rank] = {}
        for storage in {piece.storage for piece in layout}:
            pieces = [piece for piece in layout if piece.storage == storage]
            memory[rank][storage] = np.zeros(max(piece.offset + piece.elements for piece in pieces))
    return memory


def inside(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


def least_bytes(shapes: Shapes, rank: int, sources: Mapping[int, Layout], destinations: Mapping[int, Layout]) -> int:
    """What `rank` wants and does not hold, counted element by element."""
    missing = 0
    for piece in destinations.get(rank, ()):
        held = np.zeros(shapes[piece.name], dtype=bool)
        for own in sources.get(rank, ()):
            if own.name == piece.name:
                held[inside(own)] = True
        missing += int((~held[inside(piece)]).sum()) * {"float32": 4, "bfloat16": 2}[piece.dtype]
    return missing


def check(
    shapes: Shapes, sources: Mapping[int, Layout], destinations: Mapping[int, Layout], limit: int
) -> dict[int, Plan]:
    """Simulate the transfer of all ranks in numpy and compare with the tensors themselves."""
    values = reference_values(shapes)
    held, filled, writes = blank(sources), blank(destinations), blank(destinations)
    for rank, layout in sources.items():
        for piece in layout:
            numpy_view(held[rank], piece)[...] = values[piece.name][inside(piece)]
    ranks = sorted({*sources, *destinations})
    plans = {rank: make_plan(rank, sources, destinations) for rank in ranks}
    assert len({plan.streams for plan in plans.values()}) == 1
    for rank, plan in plans.items():
        assert set(plan.receives) <= set(ranks) - {rank}
        for by, items in plan.receives.items():
            assert plans[by].sends[rank] == items
        for to, items in plan.sends.items():
            assert plans[to].receives[rank] == items
        for by, items in [(rank, plan.local), *plan.receives.items()]:
            for bucket in buckets(items, limit):
                assert sum(item.bytes for item in bucket) <= max(limit, 4)
                for item in bucket:
                    assert item.source.box == item.destination.box == Box(item.lo, item.size)
                    numpy_view(filled[rank], item.destination)[...] = numpy_view(held[by], item.source)
                    numpy_view(writes[rank], item.destination)[...] += 1
        assert plan.minimum_bytes == plan.received_bytes == least_bytes(shapes, rank, sources, destinations)
    for rank, layout in destinations.items():
        for piece in layout:
            assert (numpy_view(writes[rank], piece) == 1).all()
            assert (numpy_view(filled[rank], piece) == values[piece.name][inside(piece)]).all()
        wanted = sum(piece.elements for piece in layout)
        assert sum(int(count.sum()) for count in writes[rank].values()) == wanted
    assert sum(plan.moved_bytes for plan in plans.values()) == sum(plan.minimum_bytes for plan in plans.values())
    return plans


shape_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
shapes_strategy = st.lists(shape_strategy, min_size=1, max_size=6).map(
    lambda found: {f"t{number}": shape for number, shape in enumerate(found)}
)


@settings(max_examples=150, deadline=None)
@given(shapes_strategy, st.randoms(use_true_random=False), st.data())
def test_grids_of_any_sizes_on_any_ranks(shapes: Shapes, draw: random.Random, data: st.DataObject) -> None:
    """Data x pipeline x tensor to replicas x tensor, on ranks that are disjoint, shared or overlapping."""
    sizes = st.integers(1, 3)
    tensor, pipeline, copies, to_tensor, replicas = (data.draw(sizes) for _ in range(5))
    world = tensor * pipeline * copies + to_tensor * replicas
    by = draw.sample(range(world), tensor * pipeline * copies)
    to = draw.sample(range(world), to_tensor * replicas)
    sources = Grid(by, tensor, pipeline).layouts(shapes, draw)
    destinations = Grid(to, to_tensor, 1, draw.choice(["float32", "bfloat16"])).layouts(shapes, draw)
    check(shapes, sources, destinations, limit=draw.choice([4, 16, 64, 10_000]))


@settings(max_examples=150, deadline=None)
@given(shapes_strategy, st.randoms(use_true_random=False), st.integers(1, 3))
def test_boxes_that_overlap_freely(shapes: Shapes, draw: random.Random, copies: int) -> None:
    sources = scattered(shapes, range(4), "float32", draw, copies)
    destinations = parts(shapes, range(2, 6), "bfloat16", draw)
    check(shapes, sources, destinations, limit=draw.choice([2, 8, 100]))


def test_replicas_share_the_sending_evenly() -> None:
    shapes = {f"layer{number}": (8, 16) for number in range(12)}
    sources = {rank: [whole_tensor(name, shape, "float32") for name, shape in shapes.items()] for rank in range(4)}
    destinations = {rank: sources[0] for rank in range(4, 7)}
    plans = check(shapes, sources, destinations, limit=1 << 20)
    assert {plans[rank].moved_bytes for rank in range(4)} == {3 * 12 * 8 * 16 * 4 // 4}
    assert plans[0].streams == 4  # each destination hears from all four


def test_a_region_already_there_does_not_travel() -> None:
    whole = whole_tensor("w", (4, 4), "float32")
    half = Piece("w", (0, 0), (2, 4), "w", 0, (4, 1), "float32")
    plans = check({"w": (4, 4)}, {0: [whole], 1: [half]}, {1: [whole]}, limit=1 << 20)
    assert plans[1].minimum_bytes == 2 * 4 * 4
    assert [item.lo for item in plans[1].local] == [(0, 0)]
    assert [item.lo for item in plans[1].receives[0]] == [(2, 0)]


def test_items_follow_the_destination_storages() -> None:
    shapes = {"q": (2, 2), "norm": (2,), "k": (2, 2)}
    source = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    fused = [
        Piece("q", (0, 0), (2, 2), "qkv", 0, (2, 1), "float32"),
        Piece("norm", (0,), (2,), "norm", 0, (1,), "float32"),
        Piece("k", (0, 0), (2, 2), "qkv", 4, (2, 1), "float32"),
    ]
    plan = make_plan(1, {0: source}, {1: fused})
    assert [item.name for item in plan.receives[0]] == ["q", "k", "norm"]


def test_scalars_travel() -> None:
    check({"scale": ()}, {0: [whole_tensor("scale", (), "float32")]}, {1: [whole_tensor("scale", (), "float32")]}, 4)


def test_unknown_tensor_is_named_on_every_rank() -> None:
    for rank in (0, 1, 2):
        with pytest.raises(
            ValueError, match=r"lm_head\.weight, wanted by rank 1 .* held by no source rank.*model\.path"
        ):
            make_plan(
                rank, {0: [whole_tensor("a", (2,), "float32")]}, {1: [whole_tensor("lm_head.weight", (2,), "float32")]}
            )


def test_uncovered_region_is_named() -> None:
    held = Piece("a", (0, 0), (3, 2), "a", 0, (2, 1), "float32")
    with pytest.raises(ValueError, match=r"region \[3:4, 0:2\] of tensor a, wanted by rank 1"):
        make_plan(0, {0: [held]}, {1: [whole_tensor("a", (4, 2), "float32")]})


def test_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="tensor a has 1 dimensions at the source and 2"):
        make_plan(0, {0: [whole_tensor("a", (4,), "float32")]}, {1: [whole_tensor("a", (2, 2), "float32")]})


def test_ranks_without_a_part_have_an_empty_plan() -> None:
    piece = whole_tensor("a", (4,), "float32")
    plan = make_plan(7, {0: [piece]}, {1: [piece]})
    assert not (plan.local or plan.sends or plan.receives or plan.minimum_bytes or plan.moved_bytes)


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
        sources = Grid(range(8), 4, 1).layouts(shapes, draw)
        destinations = Grid(range(8, 16), 2, 1).layouts(shapes, draw)
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            make_plan(0, sources, destinations)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(1600) < 64 * seconds(100)
