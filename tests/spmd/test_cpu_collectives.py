"""All-gather and reduce-scatter on CPUs, through shared memory and by sends, against the whole and the sum by hand."""

from __future__ import annotations

import pytest

from tests.conftest import Ranks
from tests.spmd.cpu_collectives_on_ranks import numbers

MODULE = "tests.spmd.cpu_collectives_on_ranks"
MEMBERS = [(0, 1), (1, 3), (0, 1, 2, 3), (0, 2, 3), (2,)]


@pytest.mark.parametrize("members", MEMBERS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sends"])
@pytest.mark.parametrize(("part", "dtype"), [(0, "float32"), (3, "float32"), (200, "float32"), (331, "bfloat16")])
def test_parts_and_sums(ranks: Ranks, members: tuple[int, ...], shared: bool, part: int, dtype: str) -> None:
    """200 and 331 numbers are several chunks, the last one not full; an odd number of bfloat16s ends inside a word."""
    if len(members) == 1 and shared:
        pytest.skip("a rank alone shares no memory")
    results = ranks(4).run(f"{MODULE}:both", members, shared, part, dtype)
    gathered = [value for rank in members for value in numbers(rank, part, dtype).tolist()]
    total = sum(numbers(rank, part * len(members), "float64") for rank in members)
    for rank in range(4):
        if rank not in members:
            assert results[rank] == {}
            continue
        start = part * members.index(rank)
        own = total[start : start + part].tolist()
        assert results[rank] == {"apart": own, "within": own, "untouched": True, "gathered": gathered}


def test_the_hooks_of_fsdp(ranks: Ranks) -> None:
    whole = [0.0, 1.0, 2.0, 3.0]
    assert ranks(2).run(f"{MODULE}:through_fsdp") == [(whole, [0.0, 2.0]), (whole, [4.0, 6.0])]
