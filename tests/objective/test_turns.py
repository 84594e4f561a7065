"""Credit for turns by hand, and against the formulas written out episode by episode in plain numbers."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.data.samples import pad_rows
from aligner.objective.advantages import group_advantages
from aligner.objective.token_rewards import kl_rewards, place_rewards
from aligner.objective.turns import process_advantages, turn_gae, turn_group_advantages, turn_rewards
from aligner.objective.values import gae

F64, NAN = torch.float64, math.nan
TURN_BT = torch.tensor(
    [[0, 1, 1, 0, 2, 0], [0, 1, 0, 0, 2, 3], [0, 0, 1, 1, 0, 0], [0, 1, 2, 2, 0, 0]], dtype=torch.int32
)
"""A group of 4 episodes: of 2, 3, 1 and 2 turns; 0 is what the environment said."""
MASK_BT = TURN_BT > 0
TURN_REWARD_BT = torch.tensor(
    [[0, 0, 1.0, 0, 2.0, 0], [0, 4.0, 0, 0, 0, 2.0], [0, 0, 0, 3.0, 0, 0], [0, 0, 0, 6.0, 0, 0]], dtype=F64
)
REWARD_B = torch.tensor([4.0, 6.0, 3.0, 6.0], dtype=F64)
"""Of the first episode 1 more than its turns' rewards."""


@pytest.mark.parametrize("garbage", [0.0, NAN, math.inf])
def test_rewards_fall_where_turns_end(garbage: float) -> None:
    given_BT = TURN_REWARD_BT.masked_fill(~MASK_BT, garbage)
    placed_BT = place_rewards(REWARD_B, mask_BT=MASK_BT, turn_reward_BT=given_BT)
    assert placed_BT[0].tolist() == [0, 0, 1, 0, 3, 0] and placed_BT[1].tolist() == [0, 4, 0, 0, 0, 2]
    assert placed_BT.sum(1).tolist() == REWARD_B.tolist()
    last_BT = place_rewards(REWARD_B, mask_BT=MASK_BT)
    assert last_BT[0].tolist() == [0, 0, 0, 0, 4, 0] and last_BT[2].tolist() == [0, 0, 0, 3, 0, 0]
    missing_B = torch.tensor([4.0, NAN, 3.0, 6.0], dtype=F64)
    assert not place_rewards(missing_B, mask_BT=MASK_BT, turn_reward_BT=given_BT)[1].any()


def test_rewards_of_turns_by_hand() -> None:
    reward_BK = turn_rewards(REWARD_B, mask_BT=MASK_BT, turn_BT=TURN_BT, turn_reward_BT=TURN_REWARD_BT)
    assert reward_BK.nan_to_num(-1).tolist() == [[1, 3, -1], [4, 0, 2], [3, -1, -1], [0, 6, -1]]
    assert not MASK_BT[:0].any() and turn_rewards(
        REWARD_B[:0], mask_BT=MASK_BT[:0], turn_BT=TURN_BT[:0], turn_reward_BT=None
    ).shape == (0, 1)


def test_token_rewards_scale_and_clip_each_turn_s() -> None:
    logp_BT = torch.zeros(4, 6, dtype=F64)
    settings: dict[str, Any] = {"mask_BT": MASK_BT, "policy_logp_BT": logp_BT, "reward_scale": 2.0, "reward_clip": 1.0}
    assert kl_rewards(REWARD_B, turn_reward_BT=TURN_REWARD_BT, **settings)[0].tolist() == [0, 0, 0.5, 0, 1, 0]
    assert kl_rewards(REWARD_B, **settings)[0].tolist() == [0, 0, 0, 0, 1, 0]


def test_turn_group_advantages_by_hand() -> None:
    given: dict[str, Any] = {"mask_BT": MASK_BT, "turn_BT": TURN_BT, "turn_reward_BT": TURN_REWARD_BT, "group_size": 4}
    # gamma 1/2: returns of turn 1: 1 + 3/2 = 5/2; 4 + 0/2 + 2/4 = 9/2; 3; 0 + 6/2 = 3: mean 13/4.
    # Of turn 2: 3; 0 + 2/2 = 1; 6: mean 10/3. Turn 3 is the second episode's alone: 0.
    found = turn_group_advantages(REWARD_B, **given, gamma=0.5, normalize="none")
    wanted = [[0, -0.75, -0.75, 0, -1 / 3, 0], [0, 1.25, 0, 0, -7 / 3, 0], [0, 0, -0.25, -0.25, 0, 0]]
    wanted += [[0, -0.25, 8 / 3, 8 / 3, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-12)
    # Against all seven turns: 5/2, 3, 9/2, 1, 2, 3, 3, 6 -> eight of them, mean 25/8.
    found = turn_group_advantages(REWARD_B, **given, gamma=0.5, normalize="none", compare="group")
    wanted = [[0, -5 / 8, -5 / 8, 0, -1 / 8, 0], [0, 11 / 8, 0, 0, -17 / 8, -9 / 8], [0, 0, -1 / 8, -1 / 8, 0, 0]]
    wanted += [[0, -1 / 8, 23 / 8, 23 / 8, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-12)


def test_a_turn_without_a_trained_token_is_skipped() -> None:
    """What follows it still counts for the turns before: the first episode's returns are 1 + 3/2 and 3 as if it had two turns."""
    turn_BT = torch.tensor([[1, 2, 3], [1, 2, 0]])
    mask_BT = torch.tensor([[True, False, True], [True, True, False]])
    turn_reward_BT = torch.tensor([[1.0, 0, 3.0], [0, 5.0, 0]], dtype=F64)
    found = turn_group_advantages(
        torch.tensor([4.0, 5.0], dtype=F64), mask_BT=mask_BT, turn_BT=turn_BT, turn_reward_BT=turn_reward_BT,
        group_size=2, gamma=0.5, normalize="none", compare="group",
    )  # fmt: skip
    # returns 5/2, 3 | 5/2, 5: mean 13/4
    assert found.tolist() == [[-0.75, 0, -0.25], [-0.75, 1.75, 0]]


def test_process_advantages_by_hand() -> None:
    """Rewards 1, 3 | 4, 0, 2 | 3 | 0, 6: mean 19/8."""
    found = process_advantages(
        REWARD_B, mask_BT=MASK_BT, turn_BT=TURN_BT, turn_reward_BT=TURN_REWARD_BT, group_size=4, normalize="none"
    )
    less = [[-11 / 8, 5 / 8], [13 / 8, -19 / 8, -3 / 8], [5 / 8], [-19 / 8, 29 / 8]]
    a, b, c, d = ([math.fsum(turns[k:]) for k in range(len(turns))] for turns in less)
    wanted = [[0, a[0], a[0], 0, a[1], 0], [0, b[0], 0, 0, b[1], b[2]], [0, 0, c[0], c[0], 0, 0], [0, d[0], d[1], d[1], 0, 0]]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [turn_group_advantages, process_advantages])
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_rows_of_one_turn_have_the_advantages_of_rows(function: Any, normalize: Any) -> None:
    """To the last bit, in float32, with a missing reward, and with or without rewards of turns."""
    mask_BT = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    reward_B = torch.tensor([0.1, 0.7, NAN, -0.3])
    of_rows_B = group_advantages(reward_B, group_size=2, normalize=normalize)
    last_BT = place_rewards(reward_B, mask_BT=mask_BT).float()
    for turn_reward_BT in (None, last_BT, torch.zeros(4, 3)):
        found = function(
            reward_B, mask_BT=mask_BT, turn_BT=mask_BT.int(), turn_reward_BT=turn_reward_BT, group_size=2,
            normalize=normalize,
        )  # fmt: skip
        assert torch.equal(found, torch.where(mask_BT, of_rows_B[:, None], 0.0)) and found.dtype == torch.float32


EPISODES = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from([-1.0, 0.0, 0.25, 2.0])), max_size=4),
    min_size=2,
    max_size=6,
).filter(lambda rows: len(rows) % 2 == 0)
"""Turns of each row: (tokens of context before it, tokens sampled, reward)."""


def tensors(rows: list[list[tuple[int, int, float]]]) -> tuple[Tensor, Tensor]:
    turns = [
        [0, *(n for k, (before, count, _) in enumerate(row, 1) for n in [0] * before + [k] * count)] for row in rows
    ]
    rewards = [
        [0.0, *(r for before, count, reward in row for r in [0.0] * (before + count - 1) + [reward])] for row in rows
    ]
    return pad_rows(turns, torch.int32), pad_rows(rewards, F64)


def written_out(rows: Any, missing: list[bool], more: list[float], gamma: float, compare: str) -> list[list[float]]:
    """The advantage of each turn of each row, with plain numbers; groups of 2."""
    returns: list[list[float]] = []
    for row, none, extra in zip(rows, missing, more, strict=True):
        rewards = [reward for *_, reward in row]
        if rewards:
            rewards[-1] += extra
        left = [sum(gamma**j * r for j, r in enumerate(rewards[k:])) for k in range(len(rewards))]
        returns.append([] if none else left)
    made = []
    for b, row in enumerate(rows):
        group = [returns[b - b % 2 + i] for i in range(2)]
        values = []
        for k in range(len(row)):
            others = [r[k] for r in group if len(r) > k] if compare == "turn" else [x for r in group for x in r]
            alone = missing[b] or len(others) < 2
            values.append(0.0 if alone else (returns[b][k] - fmean(others)) / (stdev(others) + 1e-4))
        made.append(values)
    return made


@settings(deadline=None, max_examples=150)
@given(
    rows=EPISODES, gamma=st.sampled_from([0.0, 0.9, 1.0]), compare=st.sampled_from(["turn", "group"]), data=st.data()
)
def test_turn_group_advantages_are_the_formula(rows: Any, gamma: float, compare: Any, data: st.DataObject) -> None:
    missing = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    more = data.draw(st.lists(st.sampled_from([0.0, 1.5]), min_size=len(rows), max_size=len(rows)))
    turn_BT, turn_reward_BT = tensors(rows)
    reward_B = turn_reward_BT.sum(1) + torch.tensor(more, dtype=F64)
    reward_B[torch.tensor(missing)] = NAN
    found = turn_group_advantages(
        reward_B, mask_BT=turn_BT > 0, turn_BT=turn_BT, turn_reward_BT=turn_reward_BT, group_size=2, gamma=gamma,
        compare=compare,
    )  # fmt: skip
    for b, values in enumerate(written_out(rows, missing, more, gamma, compare)):
        wanted = [0.0 if k == 0 else values[k - 1] for k in turn_BT[b].tolist()]
        assert found[b].tolist() == pytest.approx(wanted, abs=1e-9, rel=1e-9)


def test_turn_gae_by_hand() -> None:
    """Row 0 of the group: V before its tokens 4, 7 | 6; gamma 1/2, lambda 1/2, and a KL of -1 on the first token."""
    mask_BT, turn_BT = MASK_BT[:1], TURN_BT[:1]
    reward_BT = torch.tensor([[0, -1.0, 1.0, 9.0, 3.0, 9.0]], dtype=F64)
    value_BT = torch.tensor([[9.0, 4.0, 7.0, 9.0, 6.0, 9.0]], dtype=F64)
    # Turn 2: A = 3 - 6 = -3. Turn 1: delta = (-1 + 1) + 6/2 - 4 = -1; A = -1 - 3/4 = -7/4.
    # Returns: turn 2: 3; first turn's second token: 1 + 1/2 (6 + 1/2 * -3) = 13/4, its first: one less.
    advantage_BT, return_BT = turn_gae(reward_BT, value_BT, mask_BT, turn_BT=turn_BT, gamma=0.5, lam=0.5)
    assert advantage_BT.tolist() == [[0, -1.75, -1.75, 0, -3, 0]]
    assert return_BT.tolist() == [[0, 2.25, 3.25, 0, 3, 0]]
    by_token_BT, same_BT = turn_gae(reward_BT, value_BT, mask_BT, turn_BT=turn_BT, gamma=0.5, lam=0.5, baseline="token")
    assert by_token_BT.tolist() == [[0, -1.75, 3.25 - 7, 0, -3, 0]] and torch.equal(return_BT, same_BT)


@settings(deadline=None, max_examples=150)
@given(
    rows=EPISODES,
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.8, 1.0]),
    seed=st.integers(0, 999),
)
def test_turn_gae_is_its_definition(rows: Any, gamma: float, lam: float, seed: int) -> None:
    """A_k = sum over l of (gamma lam)^l delta_(k + l) over turns, whatever stands between them."""
    turn_BT, _ = tensors(rows)
    generator = torch.Generator().manual_seed(seed)
    reward_BT, value_BT = (torch.randn(turn_BT.shape, generator=generator, dtype=F64) for _ in range(2))
    given: dict[str, Any] = {"turn_BT": turn_BT, "gamma": gamma, "lam": lam}
    advantage_BT, return_BT = turn_gae(reward_BT, value_BT, turn_BT > 0, **given)
    by_token_BT, _ = turn_gae(reward_BT, value_BT, turn_BT > 0, **given, baseline="token")
    for b, numbers in enumerate(turn_BT.tolist()):
        turns = [[t for t, number in enumerate(numbers) if number == k] for k in range(1, max(numbers) + 1)]
        rewards = [math.fsum(reward_BT[b, t].item() for t in turn) for turn in turns]
        values = [*(value_BT[b, turn[0]].item() for turn in turns), 0.0]
        delta = [r + gamma * values[k + 1] - values[k] for k, r in enumerate(rewards)]
        wanted = [math.fsum((gamma * lam) ** n * d for n, d in enumerate(delta[k:])) for k in range(len(turns))]
        for k, turn in enumerate(turns):
            for place, t in enumerate(turn):
                assert advantage_BT[b, t].item() == pytest.approx(wanted[k], abs=1e-9)
                passed = math.fsum(reward_BT[b, earlier].item() for earlier in turn[:place])
                target = wanted[k] + values[k] - passed
                assert return_BT[b, t].item() == pytest.approx(target, abs=1e-9)
                assert by_token_BT[b, t].item() == pytest.approx(target - value_BT[b, t].item(), abs=1e-9)
        outside = [t for t, number in enumerate(numbers) if number == 0]
        assert not advantage_BT[b, outside].any() and not return_BT[b, outside].any()


def test_turns_of_one_token_are_tokens() -> None:
    """Then both estimators have the same time steps; also where observations stand between them."""
    mask_BT = torch.tensor([[0, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    turn_BT = (mask_BT.cumsum(1) * mask_BT).int()
    reward_BT, value_BT = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    of_tokens = gae(reward_BT, value_BT, mask_BT, gamma=0.9, lam=0.7)
    of_turns = turn_gae(reward_BT, value_BT, mask_BT, turn_BT=turn_BT, gamma=0.9, lam=0.7)
    for one, other in zip(of_tokens, of_turns, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"compare": "all"}, "compare='all' is unknown; use one of turn, group"), ({"gamma": 2.0}, "gamma=2.0 must lie"),
     ({"normalize": "max"}, "normalize='max' is unknown")],
)  # fmt: skip
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        turn_group_advantages(REWARD_B, mask_BT=MASK_BT, turn_BT=TURN_BT, group_size=4, **settings)


def test_wrong_settings_of_gae_are_named() -> None:
    zero_BT = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="baseline='mean' is unknown; use one of turn, token"):
        turn_gae(zero_BT, zero_BT, MASK_BT, turn_BT=TURN_BT, baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lam=-1 must lie in \[0, 1\]"):
        turn_gae(zero_BT, zero_BT, MASK_BT, turn_BT=TURN_BT, lam=-1)
