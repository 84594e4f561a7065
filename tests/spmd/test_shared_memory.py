"""Messages handed over in memory that ranks share: three processes, in order and intact, and what may go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligner.spmd.shared_memory import SLOTS
from tests.conftest import Ranks, Torchrun

MODULE = "tests.spmd.shared_memory_on_ranks"


def test_messages_arrive_in_order_and_are_not_written_over(ranks: Ranks) -> None:
    """Each is read only when its sender has no room left, and slots grow from 1 word to 4,900."""
    sizes = [1 + number * 997 % 5000 for number in range(60)]
    expected = [[(number + 1) * words, words] for number, words in enumerate(sizes)]
    for messages in ranks(3).run(f"{MODULE}:around"):
        assert messages == expected[: 60 - (SLOTS - 1)]


def test_a_rank_alone_has_no_lines(ranks: Ranks) -> None:
    assert ranks(3).run(f"{MODULE}:alone") == [True] * 3


def test_ranks_of_two_hosts_have_no_lines(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(3).run(f"{MODULE}:elsewhere", tmp_path) == [True] * 3


@pytest.mark.parametrize("lines", [0, 1], ids=["no listener", "no connection"])
def test_where_one_rank_cannot_nobody_does_and_the_first_rank_says_why(ranks: Ranks, lines: int) -> None:
    none, logged = zip(*ranks(3).run(f"{MODULE}:without", lines), strict=True)
    assert none == (True,) * 3
    assert [len(of_rank) for of_rank in logged] == [1, 0, 0]
    assert "over gloo" in logged[0][0]
    assert "rank 2: no more sockets in this container" in logged[0][0]


def test_a_rank_that_sends_nothing_is_named(ranks: Ranks) -> None:
    why = "reshard: rank 0 waited 0.2 s (timeout_seconds) for rank 1, which sent nothing"
    assert ranks(3).run(f"{MODULE}:silent")[0] == f"False: {why}"


def test_a_line_of_another_user_is_not_taken(ranks: Ranks) -> None:
    assert ranks(3).run(f"{MODULE}:strangers") == [[2]] * 3


def test_a_rank_that_is_gone_is_named_as_a_lost_connection(torchrun: Torchrun, tmp_path: Path) -> None:
    """So that the job's report blames the rank that ended, not those that miss it."""
    done = torchrun(3, ["-m", "tests.spmd.lost_peer", str(tmp_path)], seconds=90)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads((tmp_path / "0.json").read_text())
    assert errors == ["True: reshard: connection closed by peer: rank 2 is gone, rank 0 needs it"] * 3
