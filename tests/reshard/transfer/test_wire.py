"""Deltas between real gloo ranks: exact after any change, accounted for, and no hang when something breaks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.conftest import Ranks

MODULE = "tests.reshard.transfer.wire_on_ranks"
LARGE, SMALL = 1 << 20, 6000
RELAYS = ("relays", "relays, both data types")
LAYOUTS = (*RELAYS, "one to several without relays", "colocated", "anything")
CASES = [(layout, size) for layout in LAYOUTS for size in (LARGE, SMALL)]
"""(layout, bytes of a bucket)."""
UNVERIFIED = ("anything", SMALL)
Rows = dict[str, list[dict[str, float]]]
"""By transfer, the account of each rank."""
Transferred = Callable[[str, int], Rows]

each_case = pytest.mark.parametrize(("layout", "size"), CASES)


@pytest.fixture(scope="module")
def transferred(ranks: Ranks) -> Transferred:
    """A case's transfers. Each rank has compared every element, and the bytes that changed, with tensors made by hand."""

    @functools.cache
    def rows(layout: str, size: int) -> Rows:
        of_ranks = ranks(4).run(f"{MODULE}:transfers", layout, size, (layout, size) != UNVERIFIED)
        return {change: [of_rank[change] for of_rank in of_ranks] for change in of_ranks[0]}

    return rows


def total(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[f"reshard_{name}_bytes"] for row in rows)


@each_case
def test_small_changes_are_few_bytes_and_large_ones_never_more_than_all(
    transferred: Transferred, layout: str, size: int
) -> None:
    transfers = transferred(layout, size)
    assert total(transfers["first"], "moved") == total(transfers["first"], "minimum") > 0
    for change, rows in transfers.items():
        assert total(rows, "moved") == total(rows, "received") <= total(rows, "minimum"), change
        assert all(row["reshard_received_bytes"] <= row["reshard_minimum_bytes"] for row in rows), change
    shares = {change: total(rows, "moved") / total(rows, "minimum") for change, rows in transfers.items()}
    assert shares["everything"] == 1
    if size == LARGE:
        # A changed element takes 2 bytes for its place, or all take a bit each.
        assert shares["nothing"] < 0.02 and shares["hundredth"] < 0.05 and shares["third"] < 0.42, shares
    assert shares["special stays"] == shares["nothing"] < 0.5


@pytest.mark.parametrize("size", [LARGE, SMALL])
@pytest.mark.parametrize("layout", RELAYS)
def test_relays_pass_deltas_on(transferred: Transferred, layout: str, size: int) -> None:
    """Rank 0 sends to three ranks each byte once, they pass it on: two thirds of what moves."""
    for change, rows in transferred(layout, size).items():
        assert rows[0]["reshard_relayed_bytes"] == rows[0]["reshard_received_bytes"] == 0
        assert all(row["reshard_relayed_bytes"] == row["reshard_moved_bytes"] for row in rows[1:]), change
        assert total(rows, "relayed") == 2 * rows[0]["reshard_moved_bytes"] > 0


def test_nothing_is_relayed_where_there_are_no_relays(transferred: Transferred) -> None:
    for change, rows in transferred("one to several without relays", LARGE).items():
        assert total(rows, "relayed") == 0, change


@each_case
def test_the_kept_copy_is_what_was_sent_and_received(transferred: Transferred, layout: str, size: int) -> None:
    transfers = transferred(layout, size)
    for change, rows in transfers.items():
        assert all(row["kept"] == row["passing"] for row in rows), change
    assert sum(row["kept"] for row in transfers["first"]) > 0


@each_case
def test_every_region_is_proven(transferred: Transferred, layout: str, size: int) -> None:
    transfers = transferred(layout, size)
    counts = {change: sum(row["reshard_checksummed"] for row in rows) for change, rows in transfers.items()}
    assert len(set(counts.values())) == 1
    assert (counts["first"] == 0) == ((layout, size) == UNVERIFIED)


def test_a_source_that_fails_later_ends_every_rank(ranks: Ranks) -> None:
    errors = ranks(4).run(f"{MODULE}:unreadable")
    assert errors[0] == "KeyError: 'mlp.w'"
    for rank, error in enumerate(errors[1:], 1):
        assert error.startswith("RuntimeError: reshard: rank 0 failed while it sent") and f"to rank {rank}" in error


def test_a_damaged_copy_is_seen_where_it_is(ranks: Ranks) -> None:
    """The message carries the sums of the whole bucket: a delta on anything else does not match them."""
    errors = ranks(4).run(f"{MODULE}:damaged")
    assert not any(errors[:2] + errors[3:])
    assert "checksum mismatch in" in errors[2] and "from rank 0 to rank 2" in errors[2]
