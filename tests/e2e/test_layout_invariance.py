"""The same GRPO job under any placement, parallel sizes and rollout engine: same samples, rewards, losses and gradient norms.

Every layout is compared with one rank, over 5 steps in fp32 from the same seed, with a reference and a KL term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Rows = list[dict[str, Any]]
# The entropy term keeps the loss away from 0, where advantages cancel and a relative error says nothing.
COMMON = ("algorithm.loss.kl_coef=0.05", "algorithm.loss.entropy_coef=0.05", "policy.optimizer.lr=1e-4")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "transformers_engine": (1, ("rollout.engine=transformers",)),
    "transformers_engine_split": (2, ("rollout.engine=transformers", "placement=split", "reshard.shared_memory=false")),
    "tp2": (2, ("placement.policy.tensor=2", "placement.rollout.tensor=2")),
    "pp2": (2, ("placement.policy.pipeline=2",)),
    "cp2": (2, ("placement.policy.context=2",)),
    "tp2_rollout_2xtp1": (2, ("placement.policy.tensor=2", "placement.policy.sequence_parallel=true")),
    "split": (2, ("placement=split",)),
    "mixed": (2, ("placement=mixed",)),
    "rules_on_a_rank_of_their_own": (3, ("placement=mixed", "placement.policy.ranks=[0]", "placement.rollout.ranks=[1]", "placement.reward.ranks=[2]", "reward.workers=2")),
    "tp2_pp2_rollout_2xtp2": (
        4,
        ("placement.policy.tensor=2", "placement.policy.pipeline=2", "placement.rollout.tensor=2"),
    ),
    "split_2_2": (
        4,
        ("placement.policy.ranks=0-1", "placement.policy.tensor=2", "placement.rollout.ranks=2-3", "placement.reward.ranks=1-2"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Rows]:
    return {}


def _baseline(one_rank: dict[str, Rows], job: Callable[..., Rows]) -> Rows:
    if not one_rank:
        one_rank["rows"] = job(1, *COMMON)
    return one_rank["rows"]


WIDER = (
    "dp2",
    "transformers_engine_split",
    "tp2",
    "pp2",
    "cp2",
    "mixed",
    "tp2_rollout_2xtp1",
    "rules_on_a_rank_of_their_own",
    "split_2_2",
)
"""Run with -m matrix."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.matrix) if name in WIDER else name for name in LAYOUTS]
)
def test_same_job_under_any_layout(name: str, one_rank: dict[str, Rows], job: Callable[..., Rows]) -> None:
    expected = _baseline(one_rank, job)
    ranks, overrides = LAYOUTS[name]
    rows = job(ranks, *COMMON, *overrides)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, want in zip(rows, expected, strict=True):
        assert row["length"] == want["length"], "other samples"
        assert row["reward"] == pytest.approx(want["reward"], rel=1e-6)
        assert row["tokens"] == want["tokens"]
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert row["kl"] == pytest.approx(want["kl"], rel=1e-4, abs=1e-9)
        # on-policy: the rollout has the policy's weights, so the ratio is 1 and nothing is clipped
        assert row["gap_max"] < 1e-4
        assert abs(row["ratio_max"] - 1) < 1e-4
        assert row["clip_fraction"] == 0
        assert row["reshard_moved_bytes"] == row["reshard_minimum_bytes"]
        assert row["reshard_checksummed"] > 0
        assert 0 <= row["imbalance"] < 0.5 and 0 <= row["padding"] < 0.03
    assert {row["loss"] for row in rows} != {rows[0]["loss"]}, "the policy does not move"


@pytest.mark.matrix
def test_generation_with_the_policy_s_own_weights(job: Callable[..., Rows]) -> None:
    """Bit for bit the job whose engines have a copy, while the policy's weights leave memory for other roles."""
    own = ("policy.engine=fsdp", "placement.policy.replicas=2", "rollout.engine=transformers", "residency.mode=offload")
    copied, shared = (job(2, *COMMON, *own, f"rollout.share_policy_weights={value}") for value in ("false", "true"))
    for row, want in zip(shared, copied, strict=True):
        for name in ("length", "reward", "loss", "grad_norm", "kl", "gap_max", "ratio_max"):
            assert row[name] == want[name], name
        assert want["reshard_checksummed"] > 0 and not any(name.startswith("reshard_moved") for name in row)


def test_the_policy_learns(one_rank: dict[str, Rows], job: Callable[..., Rows]) -> None:
    """Five steps at a higher rate raise the reward; without an update it would stand still up to noise."""
    rows = job(2, "policy.optimizer.lr=3e-3", "train.steps=15", "algorithm.roles=[policy,rollout,reward]")
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2


@pytest.mark.matrix
def test_several_optimizer_steps_on_a_batch(job: Callable[..., Rows]) -> None:
    """2 epochs of 2 minibatches hold the same rows under any layout; after the first step the batch is off-policy."""
    steps = ("policy.minibatches=2", "policy.epochs=2", "train.steps=3", "policy.optimizer.lr=1e-3")
    expected = job(1, *COMMON, *steps)
    for row, want in zip(job(2, *COMMON, *steps), expected, strict=True):
        assert row["length"] == want["length"], "other samples"
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert row["gap_max"] < 1e-4, "the first step has the rollout's weights"
        assert row["ratio_max"] > 1.001, "the later ones do not"
