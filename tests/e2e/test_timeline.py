"""A job's timelines: each rank wrote its own role calls, as long as the metrics say, and its waits have causes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligner.report.traces import read_spans, uses, whole_steps


def test_every_rank_writes_what_it_did(job: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    rows = job(2, "placement=mixed", "train.steps=3", "logging.timeline_steps=2")
    spans = read_spans(tmp_path / "run0")
    assert whole_steps(spans) == [1, 2]
    calls = {(span.rank, span.name) for span in spans if span.kind == "call" and span.step == 2}
    assert {name for rank, name in calls if rank == 0} >= {"policy.update", "reference.logprobs", "policy.reshard_to"}
    assert {name for rank, name in calls if rank == 1} >= {"rollout.generate", "policy.reshard_to"}
    assert (1, "policy.update") not in calls and (0, "rollout.generate") not in calls
    weights = [span for span in spans if span.name == "weights" and span.step == 2]
    waited = {(span.rank, span.ranks) for span in weights}
    assert (1, (0,)) in waited and waited <= {(0, (1,)), (1, (0,))}, "rank 0 waits only where it has no room left"
    for step in (1, 2):
        (update,) = (span for span in spans if span.name == "policy.update" and span.step == step)
        # the span lies inside what the metric measures
        assert 0 < update.end - update.start <= rows[step - 1]["seconds_update"] + 1e-3
    used = uses([span for span in spans if span.step == 2])
    # split: while one rank samples the other waits for it, and while that one trains the first does
    assert used[0].waits["rollout.generate"] > 0 and used[1].waits["policy.update"] > 0
