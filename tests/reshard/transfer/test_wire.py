"""Deltas between real gloo ranks: exact after any change, accounted for, and no hang when something breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reshard.ranks import run_ranks

Rows = dict[str, list[dict[str, float]]]
"""By transfer, the account of each rank."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Each rank has compared every element, and the bytes that changed, with tensors made by hand."""
    return run_ranks(Path(__file__).with_name("wire_rank.py"), 4, tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def cases(ranks: list[Any]) -> dict[str, Rows]:
    first = ranks[0]["rows"]
    return {case: {change: [rank["rows"][case][change] for rank in ranks] for change in first[case]} for case in first}


def total(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[f"reshard_{name}_bytes"] for row in rows)


def test_small_changes_are_few_bytes_and_large_ones_never_more_than_all(cases: dict[str, Rows]) -> None:
    assert len(cases) == 10
    for case, transfers in cases.items():
        assert total(transfers["first"], "moved") == total(transfers["first"], "minimum") > 0, case
        for change, rows in transfers.items():
            assert total(rows, "moved") == total(rows, "received") <= total(rows, "minimum"), (case, change)
            assert all(row["reshard_received_bytes"] <= row["reshard_minimum_bytes"] for row in rows), (case, change)
        shares = {change: total(rows, "moved") / total(rows, "minimum") for change, rows in transfers.items()}
        assert shares["everything"] == 1
        if case.endswith(str(1 << 20)):
            # A changed element takes 2 bytes for its place, or all take a bit each.
            assert shares["nothing"] < 0.02 and shares["hundredth"] < 0.05 and shares["third"] < 0.42, (case, shares)
        assert shares["special stays"] == shares["nothing"] < 0.5


def test_relays_pass_deltas_on(cases: dict[str, Rows]) -> None:
    """Rank 0 sends to three ranks each byte once, they pass it on: two thirds of what moves."""
    for case in (case for case in cases if case.startswith("relays")):
        for change, rows in cases[case].items():
            assert rows[0]["reshard_relayed_bytes"] == rows[0]["reshard_received_bytes"] == 0
            assert all(row["reshard_relayed_bytes"] == row["reshard_moved_bytes"] for row in rows[1:]), (case, change)
            assert total(rows, "relayed") == 2 * rows[0]["reshard_moved_bytes"] > 0
    for change, rows in cases[f"one to several without relays, {1 << 20}"].items():
        assert total(rows, "relayed") == 0, change


def test_the_kept_copy_is_what_was_sent_and_received(cases: dict[str, Rows]) -> None:
    for case, transfers in cases.items():
        for change, rows in transfers.items():
            for row in rows:
                assert row["kept"] == row["passing"], (case, change)
        assert sum(row["kept"] for row in transfers["first"]) > 0


def test_every_region_is_proven(cases: dict[str, Rows]) -> None:
    for case, transfers in cases.items():
        counts = {change: sum(row["reshard_checksummed"] for row in rows) for change, rows in transfers.items()}
        assert len(set(counts.values())) == 1
        assert (counts["first"] == 0) == (case == "anything, 6000")


def test_a_source_that_fails_later_ends_every_rank(ranks: list[Any]) -> None:
    errors = [rank["failures"]["source"]["error"] for rank in ranks]
    assert errors[0] == "KeyError: 'mlp.w'"
    for rank, error in enumerate(errors[1:], 1):
        assert error.startswith("RuntimeError: reshard: rank 0 failed while it sent") and f"to rank {rank}" in error


def test_a_damaged_copy_is_seen_where_it_is(ranks: list[Any]) -> None:
    """The message carries the sums of the whole bucket: a delta on anything else does not match them."""
    errors = [rank["failures"]["kept"]["error"] for rank in ranks]
    assert not any(errors[:2] + errors[3:])
    assert "checksum mismatch in" in errors[2] and "from rank 0 to rank 2" in errors[2]
