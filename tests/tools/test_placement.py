"""tools/placement.py draws every rank's place in every role, worked by hand, and fails with the setting's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.models.tiny import save_tiny, tiny_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "placement.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def _drawn(*arguments: str) -> list[list[str]]:
    """The lines of the drawing, in words."""
    done = _run(*arguments)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_ranks_worked_by_hand() -> None:
    lines = _drawn(
        "4",
        "algorithm=ppo",
        "placement.policy.tensor=2",
        "placement.rollout.ranks=2-3",
        "placement.rollout.tensor=2",
        "placement.reward.ranks=1",
        "placement.critic.ranks=2-3",
        "placement.critic.pipeline=2",
    )
    assert lines[:5] == [
        ["rank", "policy", "critic", "rollout", "reference", "reward"],
        ["0", "d0", "t0", ".", ".", "d0", "t0", "."],
        ["1", "d0", "t1", ".", ".", "d0", "t1", "all"],
        ["2", "d1", "t0", "p0", "t0", "d1", "t0", "."],
        ["3", "d1", "t1", "p1", "t1", "d1", "t1", "."],
    ]
    said = [" ".join(line) for line in lines[6:]]
    assert said == [
        "d: data shard (rollout: replica); t: tensor slice; p: pipeline stage; all: the whole role; .: not there",
        "",
        "policy ranks 0-3: data 2 x tensor 2, learns",
        "critic ranks 2-3: pipeline 2, learns",
        "rollout ranks 2-3: tensor 2",
        "reference ranks 0-3: data 2 x tensor 2",
        "reward ranks 1: one rank",
        "ranks 0: shared by policy, reference",
        "ranks 1: shared by policy, reference, reward",
        "ranks 2-3: shared by policy, critic, rollout, reference",
    ]


def test_models_by_name() -> None:
    """A teacher that shares the policy's ranks and sizes, a judge on a rank of its own, an actor cut in two."""
    lines = _drawn(
        "4",
        "algorithm.roles=[policy,teacher,judge,actor]",
        "placement.policy={ranks: 0-1, tensor: 2}",
        "models.teacher={kind: frozen, path: t}",
        "models.judge={kind: engine, path: j}",
        "placement.judge.ranks=[3]",
        "models.actor={kind: policy, path: a}",
        "placement.actor={ranks: 2-3, pipeline: 2}",
    )
    assert lines[:5] == [
        ["rank", "policy", "teacher", "judge", "actor"],
        ["0", "t0", "t0", ".", "."],
        ["1", "t1", "t1", ".", "."],
        ["2", ".", ".", ".", "p0"],
        ["3", ".", ".", "all", "p1"],
    ]
    said = [" ".join(line) for line in lines]
    assert "actor ranks 2-3: pipeline 2, learns" in said and "teacher ranks 0-1: tensor 2" in said


def test_only_the_algorithm_s_roles() -> None:
    assert _drawn("1", "algorithm=sft")[0] == ["rank", "policy"]
    assert _drawn("1", "algorithm=reward_model")[-2:] == [
        ["reward_model", "ranks", "0:", "one", "rank,", "learns"],
        ["ranks", "0:", "reward_model", "alone"],
    ]


def test_hosts_devices_and_experts() -> None:
    lines = _drawn("4", "--per-node", "2", "algorithm=sft", "placement.policy.tensor=2", "placement.policy.expert=4")
    # by hand: tensor pairs 0,1 | 2,3 on a host each; with expert=4 each rank holds another fourth of the experts
    assert lines[:5] == [
        ["rank", "host", "device", "policy"],
        ["0", "0", "0", "d0", "t0", "e0"],
        ["1", "0", "1", "d0", "t1", "e1"],
        ["2", "1", "0", "d1", "t0", "e2"],
        ["3", "1", "1", "d1", "t1", "e3"],
    ]
    crossing = _drawn("4", "--per-node", "2", "algorithm=sft", "placement.policy.tensor=4")[-1]
    assert " ".join(crossing) == "placement.policy.tensor=4 spans hosts, such as ranks 0-3: slow"


def test_memory_where_the_model_can_be_read(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    lines = _drawn("2", f"model.path={tmp_path}", "placement=split", "policy.dtype=bfloat16")
    weights = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert lines[0][-1] == "GiB"
    learning, frozen = ((2 + 4 + 12) * weights / 2**30, 2 * weights / 2**30)
    assert [line[-1] for line in lines[1:3]] == [f"{learning:.2f}", f"{frozen + 4 * weights / 2**30:.2f}"]


def test_sizes_are_checked_against_the_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    done = _run("3", f"model.path={tmp_path}", "placement.policy.tensor=3")
    assert done.returncode == 2
    assert "placement.policy.tensor=3 does not divide the 8 heads" in done.stderr
    assert "is not a folder" in _run("1", f"model.path={tmp_path}/nothing").stderr


def test_a_mistake_is_named() -> None:
    done = _run("4", "placement.policy.tensor=3")
    assert done.returncode == 2
    assert done.stderr == (
        "error: placement.policy.tensor=3 does not divide its 4 rank(s) (tensor=3 x pipeline=1 x context=1); use 1, 2 or 4.\n"
    )
    for wrong in (["placement.policy.tensor=3"], ["4", "--per-node"], ["4", "--per-node", "0"], ["0"]):
        assert _run(*wrong).stderr.startswith("usage: python tools/placement.py WORLD_SIZE [--per-node N]"), wrong
