"""Rewards of tokens by hand, their sums against TRL's RLOO, returns against their definition, and garbage padding."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.objective.token_rewards import kl_penalized, kl_rewards, returns_to_go

F64, NAN = torch.float64, math.nan
# A hole in the first row, the last trained token not the row's last; nothing trained in the third.
MASK_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
LN2 = math.log(2)


def logps(garbage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios (policy over reference) of ln 2, -ln 2 in the first row and ln 2, 0, 0 in the second."""
    policy_BT = torch.full((3, 5), -1.0, dtype=F64)
    ratio_BT = torch.tensor([[0, LN2, 0, -LN2, 0], [0, 0, LN2, 0, 0], [0] * 5], dtype=F64)
    return policy_BT.masked_fill(~MASK_BT, garbage), (policy_BT - ratio_BT).masked_fill(~MASK_BT, -garbage)


@pytest.mark.parametrize("garbage", [0.0, NAN, math.inf])
def test_rewards_by_hand(garbage: float) -> None:
    policy_BT, reference_BT = logps(garbage)
    reward_B = torch.tensor([3.0, -8.0, 1.0], dtype=F64)
    inputs = {"mask_BT": MASK_BT, "policy_logp_BT": policy_BT, "reference_logp_BT": reference_BT}
    actual_BT = kl_rewards(reward_B, **inputs, kl_coef=0.1)
    tenth = 0.1 * LN2
    expected = [[0, -tenth, 0, tenth + 3, 0], [0, 0, -tenth, 0, -8], [0] * 5]
    torch.testing.assert_close(actual_BT, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-15)
    # 3 / 2 = 1.5 stays, -8 / 2 = -4 is cut to -2. k2 = ln(2)^2 / 2; k3 = 1/2 - 1 + ln 2 and 2 - 1 - ln 2.
    half = LN2**2 / 2
    for kl, up, down in (("k2", half, half), ("k3", LN2 - 0.5, 1 - LN2)):
        kinds: dict[str, Any] = {"kl": kl, "kl_coef": 1.0}
        actual_BT = kl_rewards(reward_B, **inputs, **kinds, reward_scale=2.0, reward_clip=2.0)
        expected = [[0, -up, 0, 1.5 - down, 0], [0, 0, -up, 0, -2.0], [0] * 5]
        torch.testing.assert_close(actual_BT, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-15)
    # The whole response: 3 - 0.1 (ln 2 - ln 2), -8 - 0.1 ln 2.
    penalized_B = kl_penalized(reward_B, **inputs, kl_coef=0.1)
    assert penalized_B.tolist() == pytest.approx([3.0, -8 - tenth, 1.0], abs=1e-14)


def test_without_a_reference_or_a_reward() -> None:
    policy_BT, reference_BT = logps(NAN)
    reward_B = torch.tensor([NAN, 2.0, NAN], dtype=F64)
    actual_BT = kl_rewards(reward_B, mask_BT=MASK_BT, policy_logp_BT=policy_BT)
    assert actual_BT.tolist() == [[0] * 5, [0, 0, 0, 0, 2], [0] * 5]
    inputs = {"mask_BT": MASK_BT, "policy_logp_BT": policy_BT, "reference_logp_BT": reference_BT}
    assert not kl_rewards(reward_B, **inputs, kl_coef=0.1)[0].any()
    assert kl_penalized(reward_B, **inputs, kl_coef=0.1).isnan().tolist() == [True, False, True]
    assert kl_rewards(reward_B.float(), mask_BT=MASK_BT, policy_logp_BT=policy_BT.float()).dtype == torch.float32


def test_returns_by_hand() -> None:
    reward_BT = torch.tensor([[9, 1, NAN, 4, 9], [9, 9, 1, 2, 4], [9] * 5], dtype=F64)
    # gamma 1/2: 1 + 4/2 over the hole; 4, 2 + 2, 1 + 2.
    actual_BT = returns_to_go(reward_BT, MASK_BT, gamma=0.5)
    assert actual_BT.tolist() == [[0, 3, 0, 4, 0], [0, 0, 3, 4, 4], [0] * 5]
    assert returns_to_go(reward_BT, MASK_BT).tolist() == [[0, 5, 0, 4, 0], [0, 0, 7, 6, 4], [0] * 5]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), gamma=st.sampled_from([0.0, 0.9, 1.0]), rows=st.integers(1, 4), length=st.integers(1, 7))
def test_returns_are_the_definitions(data: st.DataObject, gamma: float, rows: int, length: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask_BT = torch.tensor(bits).view(rows, length)
    reward_BT = torch.randn(rows, length, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    actual_BT = returns_to_go(reward_BT.double(), mask_BT, gamma=gamma)
    for b in range(rows):
        trained = mask_BT[b].nonzero().flatten().tolist()
        rewards = [reward_BT[b, t].item() for t in trained]
        for i, t in enumerate(trained):
            expected = math.fsum(gamma**k * reward for k, reward in enumerate(rewards[i:]))
            assert actual_BT[b, t].item() == pytest.approx(expected, abs=1e-12)
    assert not actual_BT[~mask_BT].any()


def test_mistakes_are_named() -> None:
    policy_BT, reference_BT = logps(0.0)
    reward_B = torch.zeros(3)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs reference_logp_BT"):
        kl_rewards(reward_B, mask_BT=MASK_BT, policy_logp_BT=policy_BT, kl_coef=0.1)
    for wrong in ({"reward_scale": 0.0}, {"reward_clip": NAN}):
        with pytest.raises(ValueError, match="must be more than 0"):
            kl_rewards(reward_B, mask_BT=MASK_BT, policy_logp_BT=policy_BT, **wrong)
    with pytest.raises(ValueError, match=r"gamma=1.5 must lie in \[0, 1\]"):
        returns_to_go(policy_BT, MASK_BT, gamma=1.5)
    unknown: dict[str, Any] = {"kl": "k4", "kl_coef": 1.0}
    with pytest.raises(ValueError, match="kl='k4'"):
        kl_penalized(reward_B, mask_BT=MASK_BT, policy_logp_BT=policy_BT, reference_logp_BT=reference_BT, **unknown)
    with pytest.raises(AssertionError):
        kl_rewards(torch.zeros(2), mask_BT=MASK_BT, policy_logp_BT=policy_BT)
