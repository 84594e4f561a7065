"""Reward shaping: the overlong penalty by hand and against TRL, the running scale against the statistics module."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.objective.moments import Moments
from aligner.objective.shaping import overlong_penalty, running_scale

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl


def test_overlong_by_hand() -> None:
    # 100 with a buffer of 20: free up to 80, then a twentieth a token, -1 at 100 and beyond.
    length_B = torch.tensor([0, 80, 81, 90, 99, 100, 101, 500])
    assert overlong_penalty(length_B, max_length=100, buffer=20).tolist() == pytest.approx(
        [0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    )
    # Of itself a fifth of the limit.
    assert torch.equal(
        overlong_penalty(length_B, max_length=100), overlong_penalty(length_B, max_length=100, buffer=20)
    )
    # A buffer of 0: a step, the limit itself being free.
    assert overlong_penalty(length_B, max_length=100, buffer=0).tolist() == [0, 0, 0, 0, 0, 0, -1, -1]


@pytest.mark.parametrize("buffer", [0, 1, 7, 30])
def test_overlong_against_trl(trl: Trl, buffer: int) -> None:
    length_B = torch.arange(40)
    theirs = trl.get_soft_overlong_punishment(30, buffer)([[1] * int(length) for length in length_B])
    assert overlong_penalty(length_B, max_length=30, buffer=buffer).tolist() == pytest.approx(theirs, abs=1e-7)


def test_overlong_mistakes_are_named() -> None:
    for buffer in (-1, 11):
        with pytest.raises(ValueError, match=rf"buffer={buffer} must lie in \[0, max_length=10\]"):
            overlong_penalty(torch.tensor([1]), max_length=10, buffer=buffer)
    with pytest.raises(AssertionError):
        overlong_penalty(torch.tensor([1.0]), max_length=10, buffer=1)


@settings(deadline=None, max_examples=100)
@given(
    batches=st.lists(
        st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=6), min_size=1, max_size=6
    )
)
def test_the_running_scale_is_the_deviation_of_all_rewards_so_far(batches: list[list[float]]) -> None:
    state, seen = Moments(), []
    for batch in batches:
        state, scale = running_scale(state, torch.tensor(batch, dtype=torch.float64))
        seen += [reward for reward in batch if not math.isnan(reward)]
        expected = statistics.stdev(seen) if len(seen) > 1 else 0.0
        assert scale == pytest.approx(expected, rel=1e-9, abs=1e-9) or (scale == 1.0 and expected < 1e-9)
        assert state.n == len(seen) and all(type(value) is float for value in state)


def test_the_running_scale_by_hand() -> None:
    state, scale = running_scale(Moments(), torch.tensor([5.0]))
    assert (state, scale) == (Moments(1.0, 5.0, 0.0), 1.0)  # nothing to measure yet
    state, scale = running_scale(state, torch.tensor([5.0, math.nan]))
    assert scale == 1.0  # two equal ones
    state, scale = running_scale(state, torch.tensor([8.0]))
    assert state == Moments(3.0, 6.0, 6.0) and scale == pytest.approx(math.sqrt(3))
    assert running_scale(Moments(*state), torch.tensor([math.nan]))[0] == state
