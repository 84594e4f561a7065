"""Messages by trees on 5 real ranks, no power of two: every value arrives, and no rank sends many."""

from __future__ import annotations

import pytest

from tests.conftest import Ranks

SIZE = 5


@pytest.mark.parametrize("payload", [0, 1, 4031, 4032, 4033, 200_000])
def test_payloads_that_travel_with_their_header_and_after_it(ranks: Ranks, payload: int) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_exchange", payload)


@pytest.mark.parametrize(
    ("members", "messages"), [([0, 1, 2, 3, 4], 3), ([1, 3, 4], 2), ([0, 4], 1), ([2], 0)], ids=str
)
def test_all_gather_sends_log2_of_the_ranks(ranks: Ranks, members: list[int], messages: int) -> None:
    """Rounded up."""
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_all_gather", members, messages)


@pytest.mark.parametrize(
    ("holders", "readers"),
    [([3], [0, 1, 2, 3, 4]), ([1, 2], [0, 3, 4]), ([0, 1, 2, 3, 4], [2]), ([4], [0])],
    ids=str,
)
def test_broadcast(ranks: Ranks, holders: list[int], readers: list[int]) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_broadcast", holders, readers)


def test_reduce(ranks: Ranks) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_reduce")


def test_values_of_several_roles_are_read_with_one_message_of_each_rank(ranks: Ranks) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_read_at_first")


def test_no_more_rows_are_read_than_wanted(ranks: Ranks) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_read_at_first_with_a_limit")


def test_what_was_read_once_does_not_travel_again(ranks: Ranks) -> None:
    ranks(SIZE).run("tests.spmd.messages_on_ranks:check_nothing_travels_twice")
