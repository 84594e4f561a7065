"""What ranks do in the tests of gradient reduction: the same updates with and without overlap, bucket by bucket."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.megatron import gradient_reduction
from aligner.trainer.policy import Policy
from tests.trainer.megatron.optimizer_on_ranks import batch, broken, imitate, weights


def trained(world: World, model: Path, name: str, overlap: bool, settings: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A policy after three updates of several microbatches, the second of which is skipped for its loss; their reports."""
    sizes = {name: settings.get(name, 1) for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")}
    config = PolicyConfig(
        dtype=settings.get("dtype", "float32"),
        recompute=settings.get("recompute", "none"),
        experts=settings.get("experts", "sequential"),
        overlap_grad_reduce=overlap,
        micro_tokens=18,
        # unclipped: a norm adds up by what a rank holds of each bucket
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0, distributed=settings.get("distributed", True)),
    )
    mesh = Mesh(tuple(range(world.size)), name="policy", **sizes)
    with patch.object(gradient_reduction, "BUCKET_ELEMENTS", 2000):
        policy = Policy(name, world, mesh, read_spec(model), config)
    rows = policy.scatter(batch())
    reports = [policy.update(loss, rows).gather() for loss in (imitate, broken, imitate)]
    return policy, reports


def watched(policy: Any) -> list[list[int]]:
    """For each reduction to come, how many buckets there are and how many were under way when the backward ended."""
    optimizer = policy.engine.optimizer
    groups = [
        group
        for chunk in optimizer.chunks
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        if not group.finish_grad_sync.__name__.startswith("<")  # a group of one rank
    ]
    seen: list[list[int]] = []
    config = policy.engine.model.config
    finish = config.finalize_model_grads_func

    def noted(*args: Any, **kwargs: Any) -> None:
        # Megatron-core 0.19 waits for a bucket as it sends the next one
        sent = [group.grad_reduce_handle or getattr(group, "grad_reduce_finished", False) for group in groups]
        seen.append([len(groups), sum(map(bool, sent))])
        finish(*args, **kwargs)

    config.finalize_model_grads_func = noted
    return seen


def check_same_numbers(world: World, model: Path, settings: dict[str, Any]) -> list[list[int]]:
    """Losses and weights to the bit, norms to rounding; returns what `watched` saw of a fourth update.

    Over more than two ranks a sum's order depends on where a number stands in its bucket: there everything is to rounding.
    """
    exact = world.size // math.prod(settings.get(size, 1) for size in ("tensor", "pipeline")) <= 2
    label = str(sorted(settings.items()))
    plain, expected = trained(world, model, f"after {label}", False, settings)
    overlapped, reports = trained(world, model, f"during {label}", True, settings)
    assert expected[1]["skipped_steps"] == 1
    for before, after in zip(expected, reports, strict=True):
        norms = [report.pop("grad_norm") for report in (before, after)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6 if exact else 1e-5, nan_ok=True), norms
        if exact:
            assert str(before) == str(after)  # NaN is NaN
        else:
            assert before == pytest.approx(after, rel=1e-5, nan_ok=True)
    seen = watched(overlapped)
    for policy in (plain, overlapped):
        policy.update(imitate, policy.scatter(batch())).gather()
    now = weights(overlapped)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, now[name]) if exact else torch.allclose(weight, now[name], rtol=1e-4, atol=1e-5), (
            name
        )
    return seen
