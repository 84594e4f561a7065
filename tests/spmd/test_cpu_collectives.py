"""All-gather and reduce-scatter on CPUs, through shared memory and by sends, against the whole and the sum by hand."""

from __future__ import annotations

from math import prod

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


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sends"])
def test_lists_of_parts_of_different_lengths(ranks: Ranks, shared: bool) -> None:
    """Of 3 ranks, with messages that hold several tensors and tensors that take several messages, not as many both ways."""
    lengths = [3, 0, 40, 1, 16, 31]
    results = ranks(3).run(f"{MODULE}:lists", shared, lengths)
    gathered = [[x for rank in range(3) for x in numbers(rank + n, n, "float32").tolist()] for n in lengths]
    for rank in range(3):
        summed = [(6 * numbers(length, length + rank, "float32")).tolist() for length in lengths]
        assert results[rank] == (gathered, summed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fsdp_gathers_weights_and_sums_gradients(ranks: Ranks, dtype: str) -> None:
    """Rows that divide by 3, that do not, fewer rows than ranks, and no dimension but one; also as with FSDP's own collectives."""
    sizes = [(6, 5), (7, 3), (2, 4), (10,), (1,), (4, 2, 3)]
    results = ranks(3).run(f"{MODULE}:through_fsdp", sizes, dtype)
    weights = [numbers(number, prod(size), dtype).view(size) for number, size in enumerate(sizes)]
    for rank, (gathered, gradients) in enumerate(results):
        assert gathered == [weight.tolist() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            rows = -(-len(weight) // 3)
            assert gradient == (6 * weight[rank * rows : (rank + 1) * rows]).tolist()
