"""Reduce-scatter by sending parts, against the sum by hand."""

from __future__ import annotations

import pytest

from tests.conftest import Ranks


@pytest.mark.parametrize("members", [(0, 1), (1, 3), (0, 1, 2, 3), (0, 2, 3)])
def test_reduce_scatter_sums_each_part_on_its_rank(ranks: Ranks, members: tuple[int, ...]) -> None:
    results = ranks(4).run("tests.trainer.fsdp.collectives_on_ranks:reduced", members, 3)
    factor = sum(rank + 1 for rank in members)
    for place, rank in enumerate(members):
        assert results[rank] == [factor * (3.0 * place + i) for i in range(3)]
    assert all(not results[rank] for rank in range(4) if rank not in members)
