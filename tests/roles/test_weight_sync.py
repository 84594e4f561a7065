"""Several policies and several rollouts: each engine holds, and is known to hold, what was brought to it last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("weight_sync_rank.py")


def test_two_policies_and_two_rollouts(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    done = torchrun(2, [str(PROGRAM), str(tmp_path / "model")], seconds=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-5000:]
    assert done.stdout.count("weight syncs: ok") == 2
