"""Ranks that stay from call to call, and are new after one that failed."""

from __future__ import annotations

import time

import pytest

from tests.conftest import Ranks
from tests.pool import RankError

TOTAL = "tests.pool_on_ranks:total"


def test_each_rank_returns_and_stays(ranks: Ranks) -> None:
    first, second = (ranks(2).run(TOTAL, number) for number in (10, 20))
    assert [found[1:] for found in first] == [(0, 21), (1, 21)]
    assert [found[1:] for found in second] == [(0, 41), (1, 41)]
    assert [found[0] for found in first] == [found[0] for found in second]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"rank 1: Traceback(?s:.*)in fail(?s:.*)ValueError: the mistake of rank 1"),
        ("ends", r"rank 1: ended with status 7"),
        ("hangs", r"rank 1: no end within 8 s"),
        ("returns what cannot be pickled", r"rank 1: (?s:.*)(pickle|get) local object"),
    ],
)
def test_a_rank_that_fails_is_told_and_the_next_call_has_new_ranks(how: str, said: str, ranks: Ranks) -> None:
    before = ranks(2).run(TOTAL, 0)
    begin = time.monotonic()
    with pytest.raises(RankError, match=said) as error:
        ranks(2).run("tests.pool_on_ranks:fail", how, seconds=8)
    assert time.monotonic() - begin < 60
    assert "rank 0 is there" in str(error.value) and "rank 1 is there" in str(error.value)
    after = ranks(2).run(TOTAL, 0)
    assert {found[0] for found in before}.isdisjoint(found[0] for found in after)
