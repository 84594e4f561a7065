"""The registry of metrics: whole, free of contradictions, and what docs/metrics.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from aligner.config.guards import GuardConfig
from aligner.config.help import field_docs
from aligner.report.console import ROLLOUT_TABLE, SUPERVISED_TABLE, columns_for
from aligner.report.metric_registry import (
    HEADLINES,
    LEFT_OUT,
    METRICS,
    PHASES,
    as_markdown,
    best_metrics,
    has_max,
    metric_of,
    of_first_minibatch,
)
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reward.combine import reward_row
from aligner.reward.worker import Status
from tests.report.metric_names import undeclared


def test_the_page_of_metrics_is_current() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert page.read_text() == as_markdown(), "python -m aligner.report.metric_registry > docs/metrics.md"


def test_each_metric_is_declared_once_and_says_what_it_is() -> None:
    assert [name for name, times in Counter(metric.name for metric in METRICS).items() if times > 1] == []
    for metric in METRICS:
        assert metric.meaning.endswith("."), metric.name
        columns = metric.rollout or metric.supervised
        assert not (columns and metric.own_column), f"{metric.name} has a column and one of its own"
    for kind in ("rollout", "supervised", "panel"):
        places = [getattr(metric, kind).place for metric in METRICS if getattr(metric, kind)]
        assert len(set(places)) == len(places), f"two metrics in one place: {kind}"


def test_the_maximum_of_a_metric_is_declared_beside_its_mean() -> None:
    """Those of the losses are reported by what is declared: by hand, so that no declaration is lost unseen."""
    assert {metric.name for metric in METRICS if metric.also_max} == {"gap", "ratio", "kl", "weight", "staleness"}
    assert undeclared(f"{metric.name}_max" for metric in METRICS if metric.also_max) == []
    assert has_max("kl") and not has_max("entropy") and not has_max("a_metric_of_a_users_loss")
    assert [metric.name for metric in METRICS if of_first_minibatch(metric.name)] == ["gap"]


def test_what_other_parts_of_a_job_write_is_declared() -> None:
    row = SyncStats(seconds=1.0).metrics()
    one = torch.zeros(2)
    kinds = [status.name.lower() for status in Status]
    row |= reward_row(one, one.to(torch.int8), {"a": one, "b": one}, {"a": one, "b": one}, kinds)
    assert undeclared(row) == []
    assert undeclared([f"seconds_{phase.name}" for phase in PHASES]) == []
    assert undeclared([*HEADLINES, *LEFT_OUT, *best_metrics()]) == []
    docs = " ".join(field_docs(GuardConfig).values())
    watched = re.findall(r"\(metric (\w+)", docs)
    assert len(watched) == 5 and undeclared(watched) == []
    assert undeclared(f"guard/{name}" for name in GuardConfig.__dataclass_fields__) == []


def test_the_best_export_is_chosen_by_the_first_evaluation_that_there_is() -> None:
    assert list(best_metrics().items()) == [
        ("accuracy", True), ("heldout_loss", False), ("heldout_pair_accuracy", True), ("heldout_margin", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("reward/format", "reward/{component}"),
        ("reward/format_failed", "reward/{component}_failed"),
        ("critic_grad_norm", "critic_{metric}"),
        ("critic_loss", "critic_loss"),
        ("guard/kl", "guard/{guard}"),
        ("seconds_reshard_wire", "seconds_reshard_wire"),
        ("seconds_my_tool", "seconds_{own}"),
    ],
)
def test_a_family_declares_its_members(name: str, family: str) -> None:
    metric = metric_of(name)
    assert metric is not None and metric.name == family


def test_a_users_metric_needs_no_declaration_and_gets_a_column() -> None:
    assert metric_of("tool_calls") is None
    assert undeclared(["tool_calls", "seconds_my_tool", "critic_tool_calls", "loss"]) == [
        "tool_calls", "seconds_my_tool", "critic_tool_calls",
    ]  # fmt: skip
    titles = [column.title for column in columns_for(["loss", "tool_calls", "seconds_my_tool"])]
    assert titles == ["step", "loss", "tool_calls"]


def test_the_tables_by_hand() -> None:
    """What stands where on the console."""
    assert [column.title for column in ROLLOUT_TABLE] == [
        "step", "reward", "accuracy", "kl", "entropy", "length", "gap", "tok/s",
        "generate", "score", "logprobs", "update", "reshard", "GB/s",
    ]  # fmt: skip
    assert [column.metric for column in SUPERVISED_TABLE] == [
        "step", "loss", "accuracy", "pair_accuracy", "margin", "heldout_loss", "heldout_margin", "kl", "entropy",
        "grad_norm", "lr", "tokens", "tokens_per_second", "seconds",
    ]  # fmt: skip


def test_it_loads_no_torch() -> None:
    code = "import sys, aligner.report.metric_registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
