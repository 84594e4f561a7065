"""Advantages beside the group's own: RLOO, ReMax, REINFORCE++, and which groups teach; by hand and against TRL."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.objective.advantages import (
    greedy_baseline_advantages,
    group_advantages,
    has_signal,
    leave_one_out_advantages,
    reinforce_pp_advantages,
)
from aligner.objective.masked import apply_mask
from aligner.objective.moments import mean_and_std, row_moments, whiten
from aligner.objective.token_rewards import kl_penalized

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl

NAN = math.nan
REWARDS = st.one_of(st.floats(-100, 100), st.just(NAN))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- RLOO ----------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    # 1, 2, 6: the others' means are 4, 3.5, 1.5. Then 4, -, 1: each other. Then one alone, and equal ones.
    advantage_B = leave_one_out_advantages(tensor(1, 2, 6, 4, NAN, 1, NAN, 3, NAN, 7, 7, 7), group_size=3)
    assert advantage_B.tolist() == pytest.approx([-3, -1.5, 4.5, 3, 0, -3, 0, 0, 0, 0, 0, 0], abs=1e-14)
    assert advantage_B[6:].tolist() == [0.0] * 6
    assert leave_one_out_advantages(torch.tensor([1.0, 2.0]), group_size=2).dtype == torch.float32
    with pytest.raises(ValueError, match="are infinite"):
        leave_one_out_advantages(tensor(1, math.inf), group_size=2)


@settings(deadline=None, max_examples=100)
@given(groups=st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(REWARDS, min_size=n, max_size=n), min_size=1)))
def test_leave_one_out_is_the_mean_of_the_others(groups: list[list[float]]) -> None:
    expected = []
    for group in groups:
        for b, reward in enumerate(group):
            others = [other for c, other in enumerate(group) if c != b and not math.isnan(other)]
            expected.append(reward - statistics.fmean(others) if others and not math.isnan(reward) else 0.0)
    reward_B = tensor(*(reward for group in groups for reward in group))
    actual_B = leave_one_out_advantages(reward_B, group_size=len(groups[0]))
    torch.testing.assert_close(actual_B, tensor(*expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("missing", [False, True])
def test_leave_one_out_against_trl(trl: Trl, missing: bool, seed: int) -> None:
    reward_B = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if missing:
        reward_B[[1, 4, 5, 6]] = NAN
    theirs_B = trl.advantages("RLOO", reward_B, 4, normalize_advantages=False)
    torch.testing.assert_close(leave_one_out_advantages(reward_B, group_size=4), theirs_B, rtol=0, atol=1e-12)
    # Normalised over the whole batch, as TRL offers, with its epsilon; a row that is alone in its group has nothing to
    # compare and does not count. TRL's n / (n - 1) is a float32.
    theirs_B = trl.advantages("RLOO", reward_B, 4, normalize_advantages=True)
    advantage_B, compared_B = leave_one_out_advantages(reward_B, group_size=4), ~reward_B.isnan()
    if missing:
        compared_B[7] = False
    mean, std = mean_and_std(row_moments(advantage_B, compared_B))
    ours_B = whiten(advantage_B, compared_B, mean=mean, std=std, epsilon=1e-4)
    torch.testing.assert_close(ours_B, theirs_B, rtol=1e-7, atol=0)


def test_leave_one_out_with_a_kl_against_trl(trl: Trl) -> None:
    generator = torch.Generator().manual_seed(0)
    reward_B = torch.randn(8, generator=generator, dtype=torch.float64)
    policy_BT, reference_BT = (-torch.rand(8, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    lengths = [5, 1, 2, 3, 4, 5, 2, 1]
    theirs_B = trl.advantages(
        "RLOO", reward_B, 4, lengths=lengths, logp_BT=policy_BT, reference_logp_BT=reference_BT, kl_coef=0.3,
        normalize_advantages=False,
    )  # fmt: skip
    mask_BT = torch.arange(5) < torch.tensor(lengths)[:, None]
    penalized_B = kl_penalized(
        reward_B, mask_BT=mask_BT, policy_logp_BT=policy_BT, reference_logp_BT=reference_BT, kl_coef=0.3
    )
    torch.testing.assert_close(leave_one_out_advantages(penalized_B, group_size=4), theirs_B, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("normalize", "scale"), [("std", "group"), ("none", "none")])
@pytest.mark.parametrize("missing", [False, True])
def test_group_advantages_against_trl(trl: Trl, missing: bool, normalize: Any, scale: str, seed: int) -> None:
    reward_B = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if missing:
        reward_B[[1, 4, 5]] = NAN
    theirs_B = trl.advantages("GRPO", reward_B, 4, scale_rewards=scale)
    actual_B = group_advantages(reward_B, group_size=4, normalize=normalize)
    # TRL's n / (n - 1) is a float32, where there is a deviation.
    torch.testing.assert_close(actual_B, theirs_B, rtol=1e-7 if normalize == "std" else 0, atol=1e-15)


# --- ReMax ---------------------------------------------------------------------------------------------------------


def test_greedy_baseline_by_hand() -> None:
    # Two samples a prompt: 3 - 2, 1 - 2; 5 less nothing known, and a missing one.
    advantage_B = greedy_baseline_advantages(tensor(3, 1, 5, NAN), tensor(2, NAN))
    assert advantage_B.tolist() == [1, -1, 0, 0]
    assert greedy_baseline_advantages(tensor(3, 1), tensor(2, 4)).tolist() == [1, -3]
    assert greedy_baseline_advantages(tensor(), tensor()).tolist() == []
    with pytest.raises(AssertionError, match="3 rewards are not the same number for each of 2 prompts"):
        greedy_baseline_advantages(tensor(1, 2, 3), tensor(1, 2))
    with pytest.raises(ValueError, match=r"rows \[0\] are infinite"):
        greedy_baseline_advantages(tensor(1), tensor(-math.inf))


def baseline_advantages(reward_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """REINFORCE++-baseline before it is whitened: the group's mean removed, on every token."""
    return apply_mask(mask_BT, group_advantages(reward_B, group_size=2, normalize="none")[:, None])


# --- REINFORCE++ ---------------------------------------------------------------------------------------------------


def test_reinforce_pp_by_hand() -> None:
    # Returns to go 3, 4 (over a hole) and 8; mean 5, squares 4 + 1 + 9 = 14, sample deviation sqrt(7).
    mask_BT = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    reward_BT = torch.tensor([[9.0, -1.0, NAN, 4.0], [9.0, 8.0, 9.0, 9.0]], dtype=torch.float64)
    advantage_BT = reinforce_pp_advantages(reward_BT, mask_BT)
    assert advantage_BT.tolist() == [[0, 3, 0, 4], [0, 8, 0, 0]]
    mean, std = mean_and_std(row_moments(advantage_BT, mask_BT))
    assert mean == 5.0 and std == pytest.approx(math.sqrt(7), abs=1e-15)
    whitened_BT = whiten(advantage_BT, mask_BT, mean=mean, std=std, epsilon=0.0)
    expected_BT = torch.tensor([[0, -2, 0, -1], [0, 3, 0, 0]], dtype=torch.float64) / math.sqrt(7)
    torch.testing.assert_close(whitened_BT, expected_BT, rtol=0, atol=1e-15)


def test_reinforce_pp_baseline_by_hand() -> None:
    # Group means 2 and (of the one that is there) 5. Tokens: -1, -1, 1, then 0; the missing row's mask is cleared.
    reward_B = tensor(1, 3, 5, NAN)
    mask_BT = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    advantage_BT = baseline_advantages(reward_B, mask_BT)
    assert advantage_BT.tolist() == [[0, -1, -1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    trained_BT = mask_BT & ~reward_B.isnan()[:, None]
    # Mean -1/4; squares 2 (3/4)^2 + (5/4)^2 + (1/4)^2 = 2.75; sample variance 2.75 / 3.
    mean, std = mean_and_std(row_moments(advantage_BT, trained_BT))
    assert (mean, std) == (-0.25, pytest.approx(math.sqrt(2.75 / 3), abs=1e-15))


@settings(deadline=None, max_examples=50)
@given(data=st.data(), groups=st.integers(1, 5), baseline=st.booleans())
def test_reinforce_pp_is_the_same_under_any_cut(data: st.DataObject, groups: int, baseline: bool) -> None:
    rows = 2 * groups
    reward_B = tensor(*data.draw(st.lists(REWARDS, min_size=rows, max_size=rows)))
    mask_BT = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * 4, max_size=rows * 4))).view(rows, 4)
    mask_BT = mask_BT & ~reward_B.isnan()[:, None]
    owner_B = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups))).repeat_interleave(
        2
    )

    def advantages(mine_B: torch.Tensor) -> torch.Tensor:
        if baseline:
            return baseline_advantages(reward_B[mine_B], mask_BT[mine_B])
        token_BT = torch.where(mask_BT, reward_B[:, None], 0.0) / 4
        return reinforce_pp_advantages(token_BT[mine_B], mask_BT[mine_B])

    shards = [owner_B == owner for owner in range(3)]
    mean, std = mean_and_std(torch.cat([row_moments(advantages(mine_B), mask_BT[mine_B]) for mine_B in shards]))
    whole_BT = advantages(torch.ones(rows, dtype=torch.bool))
    flat = whole_BT[mask_BT].tolist()
    expected_mean = statistics.fmean(flat) if flat else 0.0
    expected_std = statistics.stdev(flat) if len(flat) > 1 else 0.0
    assert (mean, std) == (pytest.approx(expected_mean, abs=1e-10), pytest.approx(expected_std, abs=1e-10))
    for mine_B in shards:
        part_BT = whiten(advantages(mine_B), mask_BT[mine_B], mean=mean, std=std, epsilon=1e-4)
        expected_BT = torch.where(mask_BT[mine_B], (whole_BT[mine_B] - mean) / (std + 1e-4), 0.0)
        torch.testing.assert_close(part_BT, expected_BT, rtol=1e-9, atol=1e-9)


# --- DAPO ----------------------------------------------------------------------------------------------------------


def test_which_groups_have_a_signal() -> None:
    solved, hopeless, mixed, one_left = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [NAN, 1.0]
    signal_B = has_signal(tensor(*solved, *hopeless, *mixed, *one_left, NAN, NAN, 0.1, 0.1), group_size=2)
    assert signal_B.tolist() == [False] * 4 + [True] * 2 + [False] * 6
    # A missing row does not hide the others' difference, and stays with its group.
    assert has_signal(tensor(0, NAN, 1), group_size=3).tolist() == [True] * 3
