"""Sums of components, worked by hand: weights, clipping, whitening, gates, and what is missing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligner.reward.combine import combine, prepared, reward_row
from aligner.reward.config import RewardComponent

NAN = math.nan
OK, FAILED, TIMEOUT, UNPARSABLE = range(4)
KINDS = ("ok", "failed", "timeout", "unparsable")


def combined(components: dict[str, RewardComponent], raw: dict[str, list[float]], **status: list[int]) -> Any:
    raw_B = {name: torch.tensor(values) for name, values in raw.items()}
    status_B = {
        name: torch.tensor(status.get(name, [FAILED * math.isnan(v) for v in values]), dtype=torch.int8)
        for name, values in raw.items()
    }
    reward_B, worst_B = combine(raw_B, status_B, components)
    assert reward_B.dtype == torch.float32
    return reward_B.tolist(), worst_B.tolist()


def test_a_weighted_sum() -> None:
    components = {"a": RewardComponent(rule="r", weight=2.0), "b": RewardComponent(rule="r", weight=-0.5)}
    assert combined(components, {"a": [1.0, 0.0, 3.0], "b": [4.0, 1.0, -2.0]}) == ([0.0, -0.5, 7.0], [0, 0, 0])


def test_whitened_over_the_rows_that_have_a_value() -> None:
    """Mean 2, population variance (4 + 0 + 4) / 3."""
    value_B = prepared(torch.tensor([0.0, NAN, 2.0, 4.0]), RewardComponent(rule="r", normalize="batch"))
    expected = [-2 / math.sqrt(8 / 3), NAN, 0.0, 2 / math.sqrt(8 / 3)]
    np.testing.assert_allclose(value_B.numpy(), expected, rtol=1e-12)


def test_equal_values_are_whitened_to_zero_exactly() -> None:
    component = RewardComponent(rule="r", normalize="batch")
    assert prepared(torch.full((7,), 0.1), component).tolist() == [0.0] * 7
    assert prepared(torch.tensor([NAN, 5.0]), component)[1] == 0.0
    assert bool(prepared(torch.tensor([NAN, NAN]), component).isnan().all())


def test_clipped_before_whitening() -> None:
    """-100, 0, 1, 100 cut to [-1, 1]: -1, 0, 1, 1 has mean 1/4 and variance 3/4 - 1/16 = 11/16."""
    component = RewardComponent(rule="r", normalize="batch", clip=(-1.0, 1.0))
    value_B = prepared(torch.tensor([-100.0, 0.0, 1.0, 100.0]), component)
    expected = (np.array([-1.0, 0.0, 1.0, 1.0]) - 0.25) / math.sqrt(11 / 16)
    np.testing.assert_allclose(value_B.numpy(), expected, rtol=1e-12)


@given(st.lists(st.one_of(st.floats(-1e3, 1e3, width=32), st.just(NAN)), min_size=1, max_size=40))
def test_whitening_against_numpy(values: list[float]) -> None:
    value_B = prepared(torch.tensor(values), RewardComponent(rule="r", normalize="batch")).numpy()
    x = np.array(values, dtype=np.float32).astype(np.float64)
    if np.isnan(x).all() or np.nanstd(x) <= 1e-6 * np.nanmax(np.abs(x)):
        return
    np.testing.assert_allclose(value_B, (x - np.nanmean(x)) / np.nanstd(x), rtol=1e-6, atol=1e-6)


def gated(**settings: Any) -> dict[str, RewardComponent]:
    return {
        "right": RewardComponent(rule="r"),
        "form": RewardComponent(rule="r", **{"weight": 0.5, "gate": "right", "gate_above": 0.5, **settings}),
    }


def test_a_closed_gate_adds_the_gates_value() -> None:
    raw = {"right": [1.0, 0.0, 0.5, 1.0], "form": [1.0, 1.0, 1.0, 0.0]}
    assert combined(gated(), raw)[0] == [1.5, 0.0, 0.5, 1.0]
    assert combined(gated(gate_value=-2.0), raw)[0] == [1.5, -1.0, -0.5, 1.0]


def test_a_gate_reads_the_raw_value() -> None:
    components = {
        "right": RewardComponent(rule="r", weight=0.0, normalize="batch", clip=(0.0, 0.1)),
        "form": RewardComponent(rule="r", gate="right", gate_above=5.0),
    }
    assert combined(components, {"right": [6.0, 5.0, 4.0], "form": [1.0, 1.0, 1.0]})[0] == [1.0, 0.0, 0.0]


def test_a_row_that_lacks_what_it_needs_is_missing_and_never_zero() -> None:
    raw = {"right": [1.0, NAN, 1.0, 0.0], "form": [1.0, 1.0, NAN, NAN]}
    reward, status = combined(gated(), raw, right=[0, TIMEOUT, 0, 0], form=[0, 0, UNPARSABLE, UNPARSABLE])
    np.testing.assert_equal(reward, [1.5, NAN, NAN, 0.0])  # in the last row the gate is closed: form is not asked
    assert status == [OK, TIMEOUT, UNPARSABLE, OK]


def test_the_worst_status_is_a_rows_status() -> None:
    components = {name: RewardComponent(rule="r") for name in "abc"}
    raw = {name: [NAN, NAN] for name in "abc"}
    _, status = combined(components, raw, a=[UNPARSABLE] * 2, b=[TIMEOUT] * 2, c=[FAILED, UNPARSABLE])
    assert status == [FAILED, TIMEOUT]


def test_a_component_without_weight_is_only_observed() -> None:
    components = {"a": RewardComponent(rule="r"), "seen": RewardComponent(rule="r", weight=0.0)}
    assert combined(components, {"a": [1.0, 2.0], "seen": [NAN, 9.0]}) == ([1.0, 2.0], [OK, OK])


def test_a_gate_that_is_missing_makes_the_row_missing() -> None:
    components = {"g": RewardComponent(rule="r", weight=0.0), "a": RewardComponent(rule="r", gate="g")}
    reward, status = combined(components, {"g": [NAN], "a": [1.0]})
    assert math.isnan(reward[0]) and status == [FAILED]


def test_the_row_that_is_logged() -> None:
    raw = {"a": torch.tensor([1.0, NAN, 2.0, NAN]), "b": torch.tensor([3.0, 3.0, 3.0, 6.0])}
    status = {
        "a": torch.tensor([OK, TIMEOUT, OK, UNPARSABLE], dtype=torch.int8),
        "b": torch.zeros(4, dtype=torch.int8),
    }
    row = reward_row(torch.tensor([4.0, NAN, 5.0, NAN]), status["a"], raw, status, KINDS)
    assert row == {
        "reward": 4.5, "reward_ok": 2.0, "reward_failed": 0.0, "reward_timeout": 1.0, "reward_unparsable": 1.0,
        "reward/a": 1.5, "reward/a_failed": 0.0, "reward/a_timeout": 1.0, "reward/a_unparsable": 1.0,
        "reward/b": 3.75, "reward/b_failed": 0.0, "reward/b_timeout": 0.0, "reward/b_unparsable": 0.0,
    }  # fmt: skip
    alone = reward_row(raw["a"], status["a"], {"a": raw["a"]}, {"a": status["a"]}, KINDS)
    assert set(alone) == {"reward", *(f"reward_{kind}" for kind in KINDS)}
    assert math.isnan(reward_row(torch.tensor([NAN]), status["a"][1:2], {}, {}, KINDS)["reward"])


@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_no_rows(normalize: str) -> None:
    assert combined({"a": RewardComponent(rule="r", normalize=normalize)}, {"a": []}) == ([], [])
