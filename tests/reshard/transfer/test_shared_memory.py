"""Messages handed over in memory that ranks share: three processes, in order and intact, and what may go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reshard.ranks import run_ranks

SCRIPT = Path(__file__).with_name("shared_memory_rank.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(SCRIPT, 3, tmp_path_factory.mktemp("neighbours"))


def test_messages_arrive_in_order_and_are_not_written_over(ranks: list[Any]) -> None:
    """Each is read only when its sender has no room left, and rooms grow from 1 word to 4,900."""
    sizes = [1 + number * 997 % 5000 for number in range(60)]
    expected = [[(number + 1) * words, words] for number, words in enumerate(sizes)]
    for rank in ranks:
        assert rank["around"] == expected[: len(rank["around"])]
        assert len(rank["around"]) == 59


def test_ranks_of_two_hosts_and_a_rank_alone_have_no_lines(ranks: list[Any]) -> None:
    assert all(rank["elsewhere"] and rank["alone"] for rank in ranks)


@pytest.mark.parametrize("case", ["no listener", "no connection"])
def test_where_one_rank_cannot_nobody_does_and_the_first_rank_says_why(ranks: list[Any], case: str) -> None:
    assert [rank[case][0] for rank in ranks] == [True] * 3
    assert [len(rank[case][1]) for rank in ranks] == [1, 0, 0]
    assert "over gloo" in ranks[0][case][1][0]
    assert "rank 2: no more sockets in this container" in ranks[0][case][1][0]


def test_a_rank_that_sends_nothing_is_named(ranks: list[Any]) -> None:
    told = "reshard: rank 0 waited 0.2 s (timeout_seconds) for rank 1, which sent nothing"
    assert ranks[0]["silent"] == f"False: {told}"


def test_a_line_of_another_user_is_not_taken(ranks: list[Any]) -> None:
    assert [rank["strangers"] for rank in ranks] == [[2]] * 3


def test_a_rank_that_is_gone_is_named_as_a_lost_connection(tmp_path: Path) -> None:
    """So that the job's report blames the rank that ended, not those that miss it."""
    told, *_ = run_ranks(SCRIPT, 3, tmp_path, "ended")
    assert told == ["True: reshard: connection closed by peer: rank 2 is gone, rank 0 needs it"] * 3
