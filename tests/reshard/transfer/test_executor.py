"""Transfers between real gloo ranks: bit-exact under any layout, minimal, proven, and no hang when something breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import whole_tensor
from aligner.reshard.plan.schedule import STAGED
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.shared_memory import SLOTS
from aligner.reshard.transfer.sync_stats import SyncStats, total
from tests.reshard.ranks import run_ranks


@pytest.fixture(scope="module", params=[2, 4])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    return run_ranks(Path(__file__).with_name("executor_rank.py"), request.param, folder)


@pytest.fixture(params=["gloo", "shared memory"])
def ranks(request: pytest.FixtureRequest, told: list[Any]) -> list[Any]:
    """What each rank saw when messages went that way."""
    return [rank[request.param] for rank in told]


def test_every_case_is_exact_and_minimal(ranks: list[Any]) -> None:
    """Values were compared bit by bit on the ranks; here the statistics add up."""
    for name in ranks[0]["good"]:
        rows = [rank["good"][name] for rank in ranks]
        moved = sum(row["reshard_moved_bytes"] for row in rows)
        assert (
            moved
            == sum(row["reshard_minimum_bytes"] for row in rows)
            == sum(row["reshard_received_bytes"] for row in rows)
        )
        if "disjoint" in name or ("others idle" in name and "itself" not in name):
            assert moved > 0
            assert sum(row["reshard_local_bytes"] for row in rows) == 0
        checked = sum(row["reshard_checksummed"] for row in rows)
        assert (checked == 0) == ("unverified" in name)


def test_idle_ranks_fall_through(ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        if rank > 1:
            assert set(found["good"]["rank 0 to rank 1, others idle"].values()) == {0.0}
        if rank > 0:
            assert set(found["good"]["rank 0 to itself, others idle"].values()) == {0.0}


@pytest.mark.parametrize("harm", ["stale", "flipped", "swapped"])
def test_a_wrong_write_names_tensor_region_and_ranks(ranks: list[Any], harm: str) -> None:
    expected = "checksum mismatch in b.weight[0:6, 0:8] from rank 0 to rank {}: after the write engine.b"
    assert ranks[1]["failures"][harm].startswith("RuntimeError: reshard: " + expected.format(1))
    assert ranks[0]["failures"][f"local {harm}"].startswith("RuntimeError: reshard: " + expected.format(0))
    assert not ranks[0]["failures"][harm] and not ranks[1]["failures"][f"local {harm}"]


def test_exchanged_tensors_are_seen(ranks: list[Any]) -> None:
    assert "checksum mismatch in a.weight[0:6, 0:8] from rank 0 to rank 1" in ranks[1]["failures"]["items exchanged"]
    assert "2 of 3 regions" in ranks[1]["failures"]["items exchanged"]


def test_a_failing_source_raises_on_both_sides(ranks: list[Any]) -> None:
    assert ranks[0]["failures"]["source fails"] == "KeyError: 'b.weight'"
    assert "rank 0 failed while it sent" in ranks[1]["failures"]["source fails"]


def test_a_failing_source_is_passed_on_by_relays(ranks: list[Any]) -> None:
    assert ranks[0]["failures"]["source of many fails"] == "KeyError: 'b.weight'"
    for rank in range(1, len(ranks)):
        assert (
            f"rank 0 failed while it sent a.weight[0:6, 0:8] to rank {rank}"
            in ranks[rank]["failures"]["source of many fails"]
        )


def test_an_incomplete_destination_is_named(ranks: list[Any]) -> None:
    assert "engine.more (a.weight): 48 elements were not written" in ranks[1]["failures"]["not all written"]


def test_random_transfers_are_exact_minimal_and_bounded(tmp_path: Path) -> None:
    """30 random cases on 8 processes: values were compared on the ranks; statistics add up, and staging is bounded."""
    told = run_ranks(Path(__file__).with_name("executor_random.py"), 8, tmp_path)
    assert [rank["exchange"] for rank in told] == [[True, True, True]] * 8
    found = [rank["transfers"] for rank in told]
    assert len(found[0]) == 30
    relayed = 0.0
    assert {rank["slots"] for rank in told} == {0}
    for rows in zip(*found, strict=True):
        assert sum(row["reshard_moved_bytes"] for row in rows) == sum(row["reshard_minimum_bytes"] for row in rows)
        assert all(row["reshard_received_bytes"] == row["reshard_minimum_bytes"] for row in rows)
        assert all(row["messages"] <= STAGED and row["staged"] <= row["limit"] for row in rows)
        relayed += sum(row["reshard_relayed_bytes"] for row in rows)
    assert relayed > 0
    assert max(row["messages"] for rows in found for row in rows) == STAGED


def test_random_transfers_in_shared_memory(tmp_path: Path) -> None:
    """The same cases; what is passed on goes from rank to rank as well, and no rank has more than two rooms."""
    told = run_ranks(Path(__file__).with_name("executor_random.py"), 8, tmp_path, "shared")
    assert {rank["slots"] for rank in told} == {SLOTS}
    relayed = 0.0
    for rows in zip(*(rank["transfers"] for rank in told), strict=True):
        assert sum(row["reshard_moved_bytes"] for row in rows) == sum(row["reshard_minimum_bytes"] for row in rows)
        assert all(row["reshard_received_bytes"] == row["reshard_minimum_bytes"] for row in rows)
        relayed += sum(row["reshard_relayed_bytes"] for row in rows)
    assert relayed > 0


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
