"""The KL controllers by hand, and that the adaptive one finds a coefficient that holds its target."""

import math

import pytest

from aligner.objective.kl_control import AdaptiveKL, FixedKL


def test_by_hand() -> None:
    control = AdaptiveKL(initial=0.5, target=6.0, rate=0.1, max_error=0.2)
    # 6.6 / 6 - 1 = 0.1: 0.5 * 1.01. 12 / 6 - 1 = 1, cut to 0.2: 0.5 * 1.02. -3: cut to -0.2.
    assert control.update(0.5, 6.6) == pytest.approx(0.505, abs=1e-15)
    assert control.update(0.5, 12.0) == pytest.approx(0.51, abs=1e-15)
    assert control.update(0.5, -3.0) == pytest.approx(0.49, abs=1e-15)
    assert control.update(0.5, 6.0) == 0.5 and control.update(0.5, math.inf) == pytest.approx(0.51)
    assert FixedKL(initial=0.05).update(0.05, 100.0) == 0.05


def test_it_holds_the_target_of_a_policy_that_answers_it() -> None:
    """A policy whose KL is 1 / coefficient (it drifts until the penalty stops it) settles at a coefficient of 1 / 4."""
    control = AdaptiveKL(initial=1.0, target=4.0)
    coefficient = control.initial
    for _ in range(2000):
        coefficient = control.update(coefficient, 1.0 / coefficient)
    assert coefficient == pytest.approx(0.25, rel=1e-6)


def test_mistakes_are_named() -> None:
    for wrong in ({"initial": 0.0}, {"target": -1.0}, {"rate": math.nan}, {"max_error": math.inf}):
        with pytest.raises(ValueError, match=rf"kl_control\.{next(iter(wrong))}=.* must be more than 0"):
            AdaptiveKL(**wrong)
    with pytest.raises(ValueError, match="must be less than 1"):
        AdaptiveKL(rate=5.0)
    with pytest.raises(ValueError, match="must be 0 or more"):
        FixedKL(initial=-0.1)
    with pytest.raises(ValueError, match="KL of this batch is NaN"):
        AdaptiveKL().update(0.1, math.nan)
