"""Whole SFT and DPO jobs beside TRL's own trainers: the same loss and gradient norm at every step.

The comparison is tools/bench/trl_curves.py, which also compares what went in: token ids, trained tokens, order, rates.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import fork_server
from tools.bench import trl_curves

ROUNDING = 1e-5
"""Of a few steps the curves differ by far less than is promised for 50."""


def compare(folder: Path, steps: int, *options: str) -> dict[str, dict[str, Any]]:
    """{method: {layout: figures}} of a run of the tool that found the curves within its bounds."""
    out = folder / "figures.json"
    with mock.patch("subprocess.Popen", fork_server.Popen):
        assert trl_curves.main([f"--steps={steps}", f"--json={out}", *options]) == 0
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def check(layout: dict[str, Any], steps: int, limit: float) -> None:
    loss, norm = layout["loss"], layout["grad_norm"]
    assert len(loss["difference"]) == len(norm["difference"]) == steps
    assert abs(loss["first"]) < ROUNDING and abs(norm["first"]) < ROUNDING * norm["trl"][0]
    assert loss["max"] < limit and abs(loss["mean"]) < limit / 10
    assert norm["max_relative"] < limit


def check_that_it_trains(found: dict[str, dict[str, Any]], layout: str) -> None:
    """Curves that stand still agree too."""
    sft, dpo = found["sft"][layout]["loss"]["trl"], found["dpo"][layout]["loss"]["trl"]
    assert sft[-1] < sft[0] / 1.5
    assert dpo[0] == pytest.approx(math.log(2), abs=1e-4) and dpo[-1] < dpo[0] - 0.02
    for method in ("sft", "dpo"):
        norms = found[method][layout]["grad_norm"]["trl"]
        assert max(norms) > 1, "gradients are never clipped"


def test_the_same_curves_as_trl(tmp_path: Path) -> None:
    """12 steps of both methods on 2 tensor-parallel ranks."""
    found = compare(tmp_path, 12, "--layouts", "tp2")
    check_that_it_trains(found, "tp2")
    for method in ("sft", "dpo"):
        check(found[method]["tp2"], 12, 10 * ROUNDING)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_the_same_curves_as_trl_under_every_layout(tmp_path: Path) -> None:
    """50 steps, on 1 to 4 ranks: what the project promises is a difference below 1e-3, on average below 1e-4."""
    found = compare(tmp_path, 50, "--ranks", "4")
    for method in ("sft", "dpo"):
        assert sorted(found[method]) == ["dp2", "one", "pp2", "tp2", "tp2_dp2"]
        for layout in found[method].values():
            check(layout, 50, 1e-3)
    check_that_it_trains(found, "one")
