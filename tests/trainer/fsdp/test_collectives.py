"""All-gather and reduce-scatter by sends, against the whole and the sum by hand."""

from __future__ import annotations

import pytest

from tests.conftest import Ranks

MEMBERS = [(0, 1), (1, 3), (0, 1, 2, 3), (0, 2, 3)]


@pytest.mark.parametrize("members", MEMBERS)
def test_all_gather_has_the_parts_of_all_ranks_in_order(ranks: Ranks, members: tuple[int, ...]) -> None:
    results = ranks(4).run("tests.trainer.fsdp.collectives_on_ranks:gathered", members, 3)
    whole = [10.0 * rank + i for rank in members for i in range(3)]
    assert results == [whole if rank in members else [] for rank in range(4)]


def test_an_empty_all_gather(ranks: Ranks) -> None:
    assert ranks(2).run("tests.trainer.fsdp.collectives_on_ranks:gathered", (0, 1), 0) == [[], []]


@pytest.mark.parametrize("members", MEMBERS)
def test_reduce_scatter_sums_each_part_on_its_rank(ranks: Ranks, members: tuple[int, ...]) -> None:
    results = ranks(4).run("tests.trainer.fsdp.collectives_on_ranks:reduced", members, 3)
    factor = sum(rank + 1 for rank in members)
    for place, rank in enumerate(members):
        assert results[rank] == [factor * (3.0 * place + i) for i in range(3)]
    assert all(not results[rank] for rank in range(4) if rank not in members)
