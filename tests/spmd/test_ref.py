"""What a Ref is asked for as if it were a tensor ends in an error that says what to do instead."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aligner.spmd.ref import Ref


def ref(value: Any = None) -> Ref:
    return Ref(SimpleNamespace(name="reward", member=True), value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        lambda r: r.mean(),
        lambda r: r.shape,
        lambda r: r.value_B,
        lambda r: r.view(-1, 8),
        lambda r: r.item(),
        lambda r: r + 1,
        lambda r: 1 - r,
        lambda r: r * 2.0,
        lambda r: 2.0 / r,
        lambda r: r**2,
        lambda r: r @ r,
        lambda r: -r,
        lambda r: abs(r),
        lambda r: round(r),
        lambda r: r & r,
        lambda r: torch.tensor([1.0]) + r,
        lambda r: torch.tensor([1.0]) * r,
        lambda r: torch.mean(r),
        lambda r: torch.stack([r, r]),
        lambda r: torch.where(torch.tensor([True]), r, torch.zeros(1)),
        lambda r: torch.clamp(torch.zeros(1), min=r),
        lambda r: np.asarray(r),
        lambda r: np.mean(r),
        lambda r: r.__setitem__("reward_B", 0),
    ],
)
def test_a_ref_that_is_used_as_a_tensor_says_gather_and_map(use: Callable[[Ref], Any]) -> None:
    with pytest.raises((TypeError, AttributeError)) as raised:
        use(ref())
    assert "ref.gather()" in str(raised.value)
    assert "roles.reward.map(function, ref)" in str(raised.value)


@pytest.mark.parametrize(
    "use",
    [
        bool,
        len,
        iter,
        float,
        int,
        lambda r: r == 1,
        lambda r: r < 1,
        lambda r: r <= 1,
        lambda r: 1 in r,
        lambda r: r[0],
    ],
)
def test_a_ref_that_would_decide_a_branch_says_gather(use: Callable[[Ref], Any]) -> None:
    with pytest.raises(TypeError, match=r"ref\.gather\(\)"):
        use(ref())


def test_a_field_that_is_not_there_is_named_with_those_that_are() -> None:
    @dataclass
    class Scores:
        reward_B: float
        status_B: float

    with pytest.raises(LookupError, match=r"ref\['rewards'\]: a Scores has reward_B, status_B\."):
        ref(Scores(1.0, 2.0))["rewards"]
    with pytest.raises(LookupError, match=r"ref\['kl'\]: a dict has loss\."):
        ref({"loss": 1.0})["kl"]
    with pytest.raises(LookupError, match=r"ref\['mean'\]: a Tensor has no fields\."):
        ref(torch.zeros(2))["mean"]
    assert ref(Scores(1.0, 2.0))["status_B"].value == 2.0


def test_what_python_itself_asks_of_an_object_still_works() -> None:
    one = ref(3.0)
    assert copy.copy(one).value == 3.0 and copy.deepcopy(one).value == 3.0
    assert not hasattr(one, "mean") and getattr(one, "mean", None) is None
    assert {one: 1}[one] == 1 and "reward" in f"{one}"
    assert math.isnan(ref(float("nan")).value)
