"""What a loop may yield; anything else is named with what is wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligner.algorithms.step import Step, checked_step
from aligner.spmd.ref import Ref


def ref() -> Ref:
    return Ref(SimpleNamespace(name="policy", member=False))  # type: ignore[arg-type]


def test_a_step_is_handed_on() -> None:
    for step in (Step(None), Step(ref(), ref(), ref(), {"skipped": 1.0, "solved": True, "critic": ref()})):
        assert checked_step(step, "loop") is step


@pytest.mark.parametrize(
    ("yielded", "kind"),
    [(None, "None"), ({"loss": 1.0}, "a dict"), ((1, 2), "a tuple"), (1.0, "a float"), (ref(), "a Ref")],
)
def test_what_is_no_step_is_named(yielded: Any, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"my\.loop yielded {kind}; a loop yields aligner.algorithms.Step\(metrics, samples, scores\)"
    ):
        checked_step(yielded, "my.loop")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": {"loss": 1.0}}, r"Step\.metrics must be a Ref.*, or None, not a dict"),
        ({"metrics": None, "samples": torch.zeros(1)}, r"Step\.samples must be a Ref"),
        ({"metrics": None, "scores": [1.0]}, r"Step\.scores must be a Ref.* not a list"),
        ({"metrics": None, "extra_metrics": 3}, r"Step\.extra_metrics must be \{name: number or Ref\}, not a int"),
        (
            {"metrics": None, "extra_metrics": {"kl": torch.tensor(1.0)}},
            r"Step\.extra_metrics\['kl'\] must be a number .*float\(...\)",
        ),
        ({"metrics": None, "extra_metrics": {"kl": None}}, r"Step\.extra_metrics\['kl'\] must be a number .* not None"),
        ({"metrics": None, "extra_metrics": {1: 1.0}}, r"Step\.extra_metrics\[1\] must be"),
    ],
)
def test_a_value_that_cannot_be_logged_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Step(**given)
