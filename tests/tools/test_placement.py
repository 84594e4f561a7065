"""tools/placement.py prints every rank's place in every role, worked by hand, and fails with the setting's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "placement.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_ranks_worked_by_hand() -> None:
    done = _run(
        "4",
        "placement.policy.tensor=2",
        "placement.rollout.ranks=2-3",
        "placement.rollout.tensor=2",
        "placement.reward.ranks=1",
        "placement.critic.ranks=2-3",
        "placement.critic.pipeline=2",
        "placement.reward_model.ranks=3",
    )
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[:5]] == [
        ["rank", "policy", "reference", "rollout", "reward", "critic", "reward_model"],
        ["0", "d0", "t0", "d0", "t0", ".", ".", ".", "."],
        ["1", "d0", "t1", "d0", "t1", ".", "all", ".", "."],
        ["2", "d1", "t0", "d1", "t0", "t0", ".", "p0", "."],
        ["3", "d1", "t1", "d1", "t1", "t1", ".", "p1", "all"],
    ]


def test_a_mistake_is_named() -> None:
    done = _run("4", "placement.policy.tensor=3")
    assert done.returncode == 2
    assert done.stderr == (
        "error: placement.policy.tensor=3 does not divide its 4 rank(s) (tensor=3 x pipeline=1 x context=1); use 1, 2 or 4.\n"
    )
    assert _run("placement.policy.tensor=3").stderr.startswith("usage: python tools/placement.py WORLD_SIZE")
