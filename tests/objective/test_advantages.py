"""Group advantages against numbers worked by hand, against the statistics module, and where rewards are missing."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.objective.advantages import group_advantages, has_reward

NAN = math.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_groups_by_hand() -> None:
    # Group 0: 1, 2, 3, 6: mean 3; squares 4 + 1 + 0 + 9 = 14; sample variance 14/3; std 2.1602468994692865.
    # Group 1: 0, 1, 1, 0: mean 1/2; squares 4 * 1/4 = 1; sample variance 1/3; std 0.5773502691896258.
    reward_B = tensor(1, 2, 3, 6, 0, 1, 1, 0)
    std_0, std_1 = 2.1602468994692865, 0.5773502691896258
    expected_B = torch.cat([tensor(-2, -1, 0, 3) / (std_0 + 1e-4), tensor(-0.5, 0.5, 0.5, -0.5) / (std_1 + 1e-4)])
    torch.testing.assert_close(group_advantages(reward_B, group_size=4), expected_B, rtol=0, atol=1e-14)
    centered_B = tensor(-2, -1, 0, 3, -0.5, 0.5, 0.5, -0.5)
    actual_B = group_advantages(reward_B, group_size=4, normalize="none")
    torch.testing.assert_close(actual_B, centered_B, rtol=0, atol=1e-14)


def test_a_row_without_a_reward_leaves_its_group() -> None:
    # 1, -, 3, - : over the two that are there, mean 2, sample variance (1 + 1) / 1 = 2, std 1.4142135623730951.
    # Were a missing reward a 0, the mean would be 1 and the first row would look average.
    advantage_B = group_advantages(tensor(1, NAN, 3, NAN), group_size=4, epsilon=0.0)
    torch.testing.assert_close(advantage_B, tensor(-(0.5**0.5), 0, 0.5**0.5, 0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_nothing_to_compare_is_zero(normalize: str) -> None:
    one_left, none_left, equal = [7.0, NAN, NAN], [NAN, NAN, NAN], [0.1, 0.1, 0.1]
    reward_B = tensor(*one_left, *none_left, *equal)
    advantage_B = group_advantages(reward_B, group_size=3, normalize=normalize)  # type: ignore[arg-type]
    assert advantage_B.tolist() == [0.0] * 9
    assert has_reward(reward_B).tolist() == [True, False, False, False, False, False, True, True, True]


def test_groups_of_one_are_zero() -> None:
    assert group_advantages(tensor(1, 2, 3), group_size=1).tolist() == [0.0, 0.0, 0.0]


def test_a_common_offset_changes_nothing() -> None:
    # In float32 the mean of seven times 1000.1 is off by 6e-5, which over std + epsilon would be an advantage of -0.37.
    assert group_advantages(torch.full((7,), 1000.1), group_size=7).tolist() == [0.0] * 7
    low_B, high_B = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([8192.0, 8193.0, 8192.0])
    torch.testing.assert_close(group_advantages(low_B, group_size=3), group_advantages(high_B, group_size=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_the_dtype_and_the_input(dtype: torch.dtype) -> None:
    reward_B = torch.tensor([1.0, NAN, 0.0], dtype=dtype)
    before_B = reward_B.clone()
    advantage_B = group_advantages(reward_B, group_size=3)
    assert advantage_B.dtype == dtype and advantage_B.shape == (3,)
    assert torch.equal(reward_B.nan_to_num(-1.0), before_B.nan_to_num(-1.0))


@settings(deadline=None, max_examples=200)
@given(
    groups=st.integers(1, 4).flatmap(
        lambda size: st.lists(
            st.lists(st.one_of(st.floats(-100, 100), st.just(NAN)), min_size=size, max_size=size),
            min_size=1,
            max_size=4,
        )
    ),
    normalize=st.sampled_from(["std", "none"]),
)
def test_agrees_with_the_statistics_module(groups: list[list[float]], normalize: str) -> None:
    expected: list[float] = []
    for group in groups:
        there = [reward for reward in group if not math.isnan(reward)]
        for reward in group:
            if math.isnan(reward) or len(there) < 2:
                expected.append(0.0)
            else:
                scale = statistics.stdev(there) + 1e-4 if normalize == "std" else 1.0
                expected.append((reward - statistics.fmean(there)) / scale)
    reward_B = tensor(*(reward for group in groups for reward in group))
    advantage_B = group_advantages(reward_B, group_size=len(groups[0]), normalize=normalize)  # type: ignore[arg-type]
    # A reward of 1e2 is rounded at 1e-14, which the division by an epsilon of 1e-4 can make 1e-10.
    torch.testing.assert_close(advantage_B, tensor(*expected), rtol=1e-9, atol=1e-9)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"normalize='batch' is unknown; use one of std, none"):
        group_advantages(tensor(1, 2), group_size=2, normalize="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows \[1, 2\] are infinite"):
        group_advantages(tensor(1, math.inf, -math.inf, 0), group_size=2)
    with pytest.raises(AssertionError, match="3 rows are not complete groups of 2"):
        group_advantages(tensor(1, 2, 3), group_size=2)
    with pytest.raises(AssertionError, match="must be floating"):
        group_advantages(torch.tensor([1, 2]), group_size=2)
    with pytest.raises(AssertionError, match=r"must be \[B\]"):
        group_advantages(torch.zeros(2, 2), group_size=2)
