"""Which evaluation is the best: against Python's own max and min, and the figures that a job can go by."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.run.best import HIGHER_IS_BETTER, Best

VALUES = st.lists(st.one_of(st.sampled_from([0.0, 0.5, math.nan, math.inf, -math.inf]), st.floats()), max_size=12)


@given(values=VALUES, metric=st.sampled_from(sorted(HIGHER_IS_BETTER)), cut=st.integers(0, 12))
def test_the_best_so_far_is_the_first_of_the_best(values: list[float], metric: str, cut: int) -> None:
    """After each look, also when it went on from a state that JSON has held."""
    extreme = max if HIGHER_IS_BETTER[metric] else min
    best = Best(metric)
    for step, value in enumerate(values):
        if step == cut:
            held = json.loads(json.dumps(best.state()))
            best = Best(metric)
            best.restore(held)
        improved = best.look(step, value)
        numbers = [v for v in values[: step + 1] if math.isfinite(v)]
        first = values.index(extreme(numbers)) if numbers else None
        assert best.step == first
        assert improved == (first == step)
        assert best.value == (None if first is None else values[first])


def test_by_hand() -> None:
    reward, loss = Best("accuracy"), Best("heldout_loss")
    assert [reward.look(*seen) for seen in ((0, 0.5), (10, 0.5), (20, 0.75), (30, 0.7))] == [True, False, True, False]
    assert [loss.look(*seen) for seen in ((0, 2.0), (10, 2.0), (20, 1.5), (30, 1.75))] == [True, False, True, False]
    assert reward.state() == {"metric": "accuracy", "step": 20, "value": 0.75}


def test_a_state_of_another_figure_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train\.best_metric=heldout_loss, but the best so far was chosen by accuracy"
    ):
        Best("heldout_loss").restore(Best("accuracy").state())
