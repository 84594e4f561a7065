"""Transfers between real gloo ranks: bit-exact under any layout, minimal, proven, and no hang when something breaks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import whole_tensor
from aligner.reshard.plan.schedule import STAGED
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.sync_stats import SyncStats, total
from aligner.spmd.shared_memory import SLOTS
from tests.conftest import Ranks

MODULE = "tests.reshard.transfer.executor_on_ranks"
SIZES = [2, 4]
WAYS = ["gloo", "shared memory"]
REPLICATING = ["rows", "rows, narrower", "stages", "experts"]
"""Layouts in which each rank holds a part and gets the whole."""
Run = Callable[..., list[Any]]


@pytest.fixture(params=[(size, way) for size in SIZES for way in WAYS], ids=lambda case: f"{case[0]}-{case[1]}")
def world(request: pytest.FixtureRequest) -> tuple[int, str]:
    """How many ranks there are, and which way messages go."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def run(world: tuple[int, str], ranks: Ranks) -> Run:
    """run(function, *arguments): what it returns on each rank."""
    size, way = world
    return lambda function, *arguments: ranks(size).run(f"{MODULE}:{function}", way, *arguments)


def check_minimal(rows: list[dict[str, float]]) -> None:
    """Values were compared bit by bit on the ranks; here the statistics add up."""
    moved, least, received = (
        sum(row[f"reshard_{name}_bytes"] for row in rows) for name in ("moved", "minimum", "received")
    )
    assert moved == least == received


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
@pytest.mark.parametrize("layout", [*REPLICATING, "disjoint", "colocated", "anything"])
def test_a_transfer_is_exact_and_minimal(run: Run, layout: str, bucket_bytes: int, verify: bool) -> None:
    rows = run("transfer", layout, bucket_bytes, verify)
    check_minimal(rows)
    if layout == "disjoint":
        assert sum(row["reshard_moved_bytes"] for row in rows) > 0
        assert sum(row["reshard_local_bytes"] for row in rows) == 0
    assert (sum(row["reshard_checksummed"] for row in rows) > 0) == verify
    if layout in REPLICATING:
        assert all(row["reshard_minimum_bytes"] > 0 for row in rows)


@pytest.mark.parametrize("layout", ["rank 0 to rank 1", "rank 0 to itself", "rank 0 to rank 1, wider"])
def test_idle_ranks_fall_through(run: Run, layout: str) -> None:
    rows = run("transfer", layout, 500)
    check_minimal(rows)
    busy = 1 if layout == "rank 0 to itself" else 2
    assert all(set(row.values()) == {0.0} for row in rows[busy:])
    if busy == 2:
        assert sum(row["reshard_moved_bytes"] for row in rows) > 0
        assert sum(row["reshard_local_bytes"] for row in rows) == 0
    assert sum(row["reshard_checksummed"] for row in rows) > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_transfer_in_a_group_of_its_own(ranks: Ranks, way: str) -> None:
    rows = ranks(4).run(f"{MODULE}:transfer_in_a_group", way)
    check_minimal(rows)
    assert sum(row["reshard_moved_bytes"] for row in rows) > 0
    assert sum(row["reshard_local_bytes"] for row in rows) == 0
    assert sum(row["reshard_checksummed"] for row in rows) > 0


@pytest.mark.parametrize("to", [1, 0], ids=["to another rank", "to itself"])
@pytest.mark.parametrize("harm", ["stale", "flipped", "swapped"])
def test_a_wrong_write_names_tensor_region_and_ranks(run: Run, harm: str, to: int) -> None:
    errors = run("harmed", harm, to)
    said = f"checksum mismatch in b.weight[0:6, 0:8] from rank 0 to rank {to}: after the write engine.b"
    assert errors[to].startswith(f"RuntimeError: reshard: {said}")
    assert not errors[1 - to]


def test_exchanged_tensors_are_seen(run: Run) -> None:
    errors = run("exchanged")
    assert "checksum mismatch in a.weight[0:6, 0:8] from rank 0 to rank 1" in errors[1]
    assert "2 of 3 regions" in errors[1]


def test_a_failing_source_raises_on_both_sides(run: Run) -> None:
    errors = run("unreadable", [1])
    assert errors[0] == "KeyError: 'b.weight'"
    assert "rank 0 failed while it sent" in errors[1]


def test_a_failing_source_is_passed_on_by_relays(world: tuple[int, str], run: Run) -> None:
    readers = list(range(1, world[0]))
    errors = run("unreadable", readers)
    assert errors[0] == "KeyError: 'b.weight'"
    for rank in readers:
        assert f"rank 0 failed while it sent a.weight[0:6, 0:8] to rank {rank}" in errors[rank]


def test_an_incomplete_destination_is_named(run: Run) -> None:
    assert "engine.more (a.weight): 48 elements were not written" in run("incomplete")[1]


RANDOM = "tests.reshard.transfer.random_transfers_on_ranks"
RANDOM_CASES = range(30)
Transferred = Callable[[int], list[dict[str, float]]]


@pytest.fixture(scope="module")
def transferred(ranks: Ranks) -> Transferred:
    """The statistics of a random transfer's 8 ranks, over gloo, and how much each had in its buffers."""
    return functools.cache(lambda number: ranks(8).run(f"{RANDOM}:watched_transfer", number))


@pytest.fixture(scope="module")
def transferred_in_memory(ranks: Ranks) -> Transferred:
    """The same transfers in shared memory, and how many slots each rank has by now."""
    return functools.cache(lambda number: ranks(8).run(f"{RANDOM}:transfer_in_shared_memory", number))


@pytest.mark.parametrize("number", RANDOM_CASES)
def test_a_random_transfer_is_exact_minimal_and_bounded(transferred: Transferred, number: int) -> None:
    """Among 2 to 8 ranks. Values were compared on the ranks; statistics add up, and staging is bounded."""
    rows = transferred(number)
    assert sum(row["reshard_moved_bytes"] for row in rows) == sum(row["reshard_minimum_bytes"] for row in rows)
    assert all(row["reshard_received_bytes"] == row["reshard_minimum_bytes"] for row in rows)
    assert all(row["messages"] <= STAGED and row["staged"] <= row["limit"] for row in rows)


def test_random_transfers_have_relays_and_fill_the_buffers(transferred: Transferred) -> None:
    rows = [row for number in RANDOM_CASES for row in transferred(number)]
    assert sum(row["reshard_relayed_bytes"] for row in rows) > 0
    assert max(row["messages"] for row in rows) == STAGED


@pytest.mark.parametrize("number", RANDOM_CASES)
def test_a_random_transfer_in_shared_memory(transferred_in_memory: Transferred, number: int) -> None:
    """What is passed on goes from rank to rank as well, and no rank has more than SLOTS slots."""
    rows = transferred_in_memory(number)
    assert sum(row["reshard_moved_bytes"] for row in rows) == sum(row["reshard_minimum_bytes"] for row in rows)
    assert all(row["reshard_received_bytes"] == row["reshard_minimum_bytes"] for row in rows)
    assert all(row["slots"] <= SLOTS for row in rows)


def test_random_transfers_in_shared_memory_have_relays_and_use_all_slots(transferred_in_memory: Transferred) -> None:
    rows = [transferred_in_memory(number) for number in RANDOM_CASES]
    assert sum(row["reshard_relayed_bytes"] for of_ranks in rows for row in of_ranks) > 0
    assert [max(row["slots"] for row in of_rank) for of_rank in zip(*rows, strict=True)] == [SLOTS] * 8


def test_layouts_are_told_to_all(ranks: Ranks) -> None:
    """Those of replicas are one and the same list; a rank that holds nothing has none."""
    assert ranks(8).run(f"{RANDOM}:exchange") == [[True, True, True]] * 8


def test_one_process_needs_no_group() -> None:
    piece = whole_tensor("w", (30, 5), "float32")
    to = whole_tensor("w", (30, 5), "bfloat16")
    held, filled = {"w": torch.randn(30, 5)}, {"w": torch.zeros(30, 5, dtype=torch.bfloat16)}
    plan = plan_transfer(0, {0: [piece]}, {0: [to]})
    row = execute(
        plan, lambda p: strided_view(held["w"], p), TensorWeights(filled, [to]), None, torch.device("cpu"), 64
    )
    assert torch.equal(filled["w"], held["w"].bfloat16())
    assert (row.moved_bytes, row.local_bytes, row.checksummed) == (0, 300, 10)  # half of 64 bytes at a time: 3 rows


def test_a_storage_offset_is_honoured_and_a_transposed_storage_refused() -> None:
    piece = whole_tensor("w", (3, 4), "float32").crop((1, 0), (1, 4))
    part = torch.arange(24.0).view(6, 4)[3:]
    assert strided_view(part, piece).tolist() == [[16.0, 17.0, 18.0, 19.0]]
    with pytest.raises(AssertionError, match="not contiguous"):
        strided_view(torch.zeros(4, 3).t(), piece)


def test_total_adds_bytes_and_takes_the_slowest_rank() -> None:
    both = total([SyncStats(moved_bytes=3, seconds=1.0), SyncStats(moved_bytes=4, minimum_bytes=7, seconds=0.5)])
    assert (both.moved_bytes, both.minimum_bytes, both.seconds) == (7, 7, 1.0)
    assert both.metrics()["seconds_reshard"] == 1.0
