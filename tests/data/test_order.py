"""The order of an epoch: a permutation, the same for everybody, that begins anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.order import WINDOW, EpochOrder


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), seed=st.integers(0, 2**40), one=st.booleans())
def test_every_epoch_is_a_permutation_and_any_place_is_found_directly(sizes: list[int], seed: int, one: bool) -> None:
    ends = np.cumsum(sizes).tolist()
    blocks = None if one else [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    rows = ends[-1]
    order = EpochOrder(rows, blocks, seed, shuffle=True)
    dealt = [order.row(place) for place in range(2 * rows)]
    for epoch in (dealt[:rows], dealt[rows:]):
        assert sorted(epoch) == list(range(rows))
    late = EpochOrder(rows, blocks, seed, shuffle=True)
    assert [late.row(place) for place in range(2 * rows - 1, rows // 2, -1)] == dealt[2 * rows - 1 : rows // 2 : -1]
    plain = EpochOrder(rows, blocks, seed, shuffle=False)
    assert [plain.row(place) for place in range(2 * rows)] == [*range(rows), *range(rows)]


def test_a_window_reads_few_blocks_and_mixes_them() -> None:
    blocks = [range(100 * block, 100 * (block + 1)) for block in range(5 * WINDOW)]
    order = EpochOrder(100 * len(blocks), blocks, seed=3, shuffle=True)
    for window in range(5):
        rows = [order.row(100 * WINDOW * window + place) for place in range(100 * WINDOW)]
        used = {row // 100 for row in rows}
        assert len(used) == WINDOW
        assert len({row // 100 for row in rows[:100]}) == WINDOW, "the first hundred come from all of them"


@pytest.mark.parametrize("blocks", [None, [range(50), range(50, 100)]])
def test_seeds_and_epochs_differ(blocks: list[range] | None) -> None:
    orders = {
        (seed, epoch): tuple(EpochOrder(100, blocks, seed, True).row(100 * epoch + place) for place in range(100))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
