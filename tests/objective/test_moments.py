"""Moments against the statistics module, the same under any cut, and at offsets where squares run out of digits."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.objective.moments import Moments, mean_and_std, merge_moments, row_moments, whiten

F64 = torch.float64


def test_rows_by_hand() -> None:
    # 1, 3: mean 2, squares 1 + 1. A lone 5. Nothing.
    value_BT = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, math.nan], [7.0, 7.0, 7.0]])
    mask_BT = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    moments_B3 = row_moments(value_BT, mask_BT)
    assert moments_B3.dtype == F64 and moments_B3.tolist() == [[2.0, 2.0, 2.0], [1.0, 5.0, 0.0], [0.0, 0.0, 0.0]]
    # 1, 3, 5: mean 3, squares 4 + 0 + 4.
    assert merge_moments(moments_B3) == Moments(3.0, 3.0, 8.0)
    assert mean_and_std(moments_B3) == (3.0, 2.0)
    # (1 - 3) / 2, (3 - 3) / 2, (5 - 3) / 2.
    whitened_BT = whiten(value_BT, mask_BT, mean=3.0, std=2.0, epsilon=0.0)
    assert whitened_BT.tolist() == [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert whiten(value_BT, mask_BT, mean=0.0, std=2.0, epsilon=0.0)[1, 1] == 2.5
    assert mean_and_std(moments_B3[2:]) == (0.0, 0.0) and mean_and_std(moments_B3[1:]) == (5.0, 0.0)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), rows=st.integers(1, 8), length=st.integers(1, 6), offset=st.sampled_from([0.0, 1e6]))
def test_any_cut_gives_what_the_statistics_module_gives(
    data: st.DataObject, rows: int, length: int, offset: float
) -> None:
    size = rows * length
    values = data.draw(st.lists(st.floats(-100, 100), min_size=size, max_size=size))
    bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    value_BT = torch.tensor(values, dtype=F64).view(rows, length) + offset
    mask_BT = torch.tensor(bits).view(rows, length)
    there = value_BT[mask_BT].tolist()
    owner_B = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))

    order_B = torch.argsort(owner_B, stable=True)
    shards = [row_moments(value_BT[owner_B == owner], mask_BT[owner_B == owner]) for owner in range(4)]
    # A shard may also hand in its own moments, merged: a tree of any shape is the same.
    trees = [torch.tensor([merge_moments(shard_B3)], dtype=F64) for shard_B3 in shards]
    whole = mean_and_std(row_moments(value_BT, mask_BT))
    # Rows come back in their own order whoever held them, and then not a bit differs.
    gathered_B3 = torch.cat(shards)[torch.argsort(order_B)]
    assert mean_and_std(gathered_B3) == whole
    expected = (statistics.fmean(there) if there else 0.0, statistics.stdev(there) if len(there) > 1 else 0.0)
    for found in (whole, mean_and_std(torch.cat(trees))):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-7 if offset else 1e-9)


def test_an_offset_keeps_its_digits() -> None:
    """1e9 + {0, 1, 2}: a sum of squares in float64 has a last digit of 512, the deviation is 1."""
    value_BT = 1e9 + torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    mean, std = mean_and_std(row_moments(value_BT, mask_BT))
    assert (mean, std) == (1e9 + 1, 1.0)
    assert whiten(value_BT, mask_BT, mean=mean, std=std, epsilon=0.0).tolist() == [[-1.0, 0.0, 1.0]]


def test_rows_of_one_value_and_equal_values() -> None:
    """An advantage a row is a row of one; a batch of equal values is 0 and not noise over epsilon."""
    reward_B, mask_B = torch.tensor([1.0, 2.0, math.nan, 6.0]), torch.tensor([True, True, False, True])
    mean, std = mean_and_std(row_moments(reward_B, mask_B))
    assert mean == 3.0 and std == pytest.approx(math.sqrt(7))
    whitened_B = whiten(reward_B, mask_B, mean=mean, std=std)
    assert whitened_B.dtype == torch.float32 and whitened_B[2] == 0
    assert whitened_B[mask_B].tolist() == pytest.approx([value / math.sqrt(7) for value in (-2, -1, 3)])
    equal_BT, all_BT = torch.full((3, 5), 0.1), torch.ones(3, 5, dtype=torch.bool)
    mean, std = mean_and_std(row_moments(equal_BT, all_BT))
    assert whiten(equal_BT, all_BT, mean=mean, std=std).abs().max() < 1e-6


def test_wrong_shapes_are_refused() -> None:
    for value, mask in (
        (torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool)),
        (torch.zeros(2), torch.ones(2)),
        (torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)),
    ):
        with pytest.raises(AssertionError):
            row_moments(value, mask)
    with pytest.raises(AssertionError, match=r"must be \[N, 3\]"):
        merge_moments(torch.zeros(3))
