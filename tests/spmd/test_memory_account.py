"""What must leave for a call, worked by hand: parts of 1 to 4 bytes, budgets just enough and just short."""

from __future__ import annotations

import pytest

from aligner.spmd.memory_account import Key, MemoryAccount, MemoryFigures

WEIGHTS, STATE, REFERENCE = ("policy", "weights"), ("policy", "optimizer"), ("reference", "weights")
ENGINE, CACHE = ("rollout", "weights"), ("rollout", "cache")
PARTS = {WEIGHTS: 2.0, STATE: 4.0, REFERENCE: 2.0, ENGINE: 2.0, CACHE: 3.0}
ALL = frozenset({"policy", "reference", "rollout"})


def account(budget: float) -> MemoryAccount:
    made = MemoryAccount(budget)
    made.learn(MemoryFigures(PARTS, {"policy.update": 5.0, "rollout.generate": 1.0}))
    return made


@pytest.mark.parametrize(
    ("budget", "leaving"),
    [
        (18.0, []),  # 6 needed, 7 beside them, 5 of activations
        (17.9, [REFERENCE]),
        (16.0, [REFERENCE]),
        (15.9, [REFERENCE, CACHE]),
        (12.9, [REFERENCE, CACHE, ENGINE]),
        (0.0, [REFERENCE, CACHE, ENGINE]),
    ],
)
def test_no_more_leaves_than_must_and_the_first_candidates_first(budget: float, leaving: list[Key]) -> None:
    staying, candidates = {WEIGHTS, STATE}, [REFERENCE, CACHE, ENGINE]
    assert account(budget).must_leave("policy.update", staying, candidates, [ALL]) == leaving


def test_a_call_that_was_not_measured_gets_all_there_is() -> None:
    made = account(1000.0)
    assert made.must_leave("critic.update", {WEIGHTS}, [REFERENCE, CACHE], [ALL]) == [REFERENCE, CACHE]
    made.learn(MemoryFigures({}, {"critic.update": 900.0}))
    assert made.must_leave("critic.update", {WEIGHTS}, [REFERENCE, CACHE], [ALL]) == []


def test_a_part_that_nobody_has_measured_leaves() -> None:
    mine = ("policy", "my_cache")
    assert account(1000.0).must_leave("policy.update", {WEIGHTS}, [CACHE, mine], [ALL]) == [mine]


def test_only_what_is_on_a_full_rank_leaves() -> None:
    """Rank 0 holds policy and reference, rank 1 policy and engine: 2 + 4 + 2 + 5 on the one, 2 + 4 + 5 + 5 on the other."""
    ranks = [{"policy", "reference"}, {"policy", "rollout"}]
    staying, candidates = {WEIGHTS, STATE}, [REFERENCE, CACHE, ENGINE]
    assert account(16.0).must_leave("policy.update", staying, candidates, ranks) == []
    assert account(15.0).must_leave("policy.update", staying, candidates, ranks) == [CACHE]
    assert account(12.0).must_leave("policy.update", staying, candidates, ranks) == [REFERENCE, CACHE, ENGINE]


def test_the_largest_measurement_of_a_call_counts_and_the_last_one_of_a_part() -> None:
    made = account(100.0)
    made.learn(MemoryFigures({CACHE: 1.0}, {"policy.update": 2.0, "rollout.generate": 8.0}))
    assert made.needed("policy.update", ALL, [WEIGHTS, CACHE]) == 2 + 1 + 5
    assert made.needed("rollout.generate", ALL, [ENGINE]) == 2 + 8
    assert made.needed("rollout.generate", {"policy"}, [ENGINE, WEIGHTS]) == 2 + 8


def test_ranks_with_different_figures_decide_the_same_on_what_they_share() -> None:
    """The optimizer's shards are uneven and rank 1 measured more: merged in either order, one decision."""
    mine = MemoryFigures({**PARTS, STATE: 3.0}, {"policy.update": 5.0})
    other = MemoryFigures(PARTS, {"policy.update": 7.0})
    decided = set()
    for figures in (mine.merged(other), other.merged(mine), mine.merged(MemoryFigures()).merged(other)):
        made = MemoryAccount(18.0)
        made.learn(figures)
        decided.add(tuple(made.must_leave("policy.update", {WEIGHTS, STATE}, [REFERENCE, CACHE, ENGINE], [ALL])))
    assert decided == {(REFERENCE,)}  # 6 + 7 + 7 is 20


@pytest.mark.parametrize(("budget", "room"), [(20.1, True), (19.9, False)])
def test_room_is_a_tenth_of_the_budget(budget: float, room: bool) -> None:
    assert account(budget).has_room("policy.update", PARTS, [ALL]) is room  # 13 of parts and 5
