"""Metrics of an update: sums over tokens, rows and microbatches, reduced over ranks, then one row over its optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.report.metric_registry import has_max, of_first_minibatch
from aligner.spmd import batch_ops
from aligner.spmd.messages import all_gather
from aligner.spmd.world import World
from aligner.trainer.engine import TrainEngine
from aligner.trainer.loss_mean import Totals
from aligner.trainer.not_finite import EMPTY, SKIPPED


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a running sum; float64, where the value is: the host waits for a device once, in `reduce_sums`."""
    value = value.detach().double()
    sums[name] = sums.get(name, torch.zeros_like(value)) + value


def gather_metrics(sums: dict[str, Tensor], metrics: dict[str, Tensor], mask_BT: Tensor) -> None:
    """Add one microbatch's metrics to the running sums (`token/NAME` for [B, T], `row/NAME` for [B]) and, for metrics declared
    with `also_max`, to the running maxima (`max/NAME`).

    Args:
        mask_BT: on the host, where its places are found without waiting for a device.

    Raises:
        ValueError: a metric has another shape than the mask, or [B].
    """
    tokens_N, rows_N = mask_BT.flatten().nonzero()[:, 0], mask_BT.any(1).nonzero()[:, 0]
    for name, value in metrics.items():
        per_row = value.dim() == 1
        if value.shape != (mask_BT.shape[:1] if per_row else mask_BT.shape):
            raise ValueError(
                f"metric {name!r} of a loss has shape {tuple(value.shape)}; it must have {tuple(mask_BT.shape)}, a value for each "
                f"token, or {tuple(mask_BT.shape[:1])}, one for each row."
            )
        place_N = (rows_N if per_row else tokens_N).to(value.device, non_blocking=True)
        values = value.detach().flatten()[place_N].double()
        add_to(sums, f"{'row' if per_row else 'token'}/{name}", values.sum())
        if values.numel() and has_max(name):
            maximum = sums.get(f"max/{name}", values[0])
            sums[f"max/{name}"] = torch.maximum(maximum, values.max())


def gather_advantages(sums: dict[str, Tensor], fields: Mapping[str, Any], mask_BT: Tensor) -> None:
    """Metric `advantage_abs_max`: the largest absolute advantage of a trained token, if the loss has an advantage field."""
    advantages = (fields.get(name) for name in ("advantage_B", "advantage_BT"))
    for value in (value for value in advantages if isinstance(value, Tensor)):
        advantage_BT = (
            batch_ops.fit_width(value, mask_BT.shape[1]) if value.dim() == 2 else value[:, None].expand(mask_BT.shape)
        )
        magnitudes = advantage_BT[mask_BT].abs()
        sums["max/advantage_abs"] = (
            magnitudes.max().double().cpu() if magnitudes.numel() else torch.zeros((), dtype=torch.float64)
        )


def add_work(sums: dict[str, Tensor], tokens: int, distinct: int, computed: int) -> None:
    """Add a data shard's numbers of tokens in its rows and of tokens computed, for the metrics `padding` and `shared_prefix`.

    Args:
        distinct: tokens of the rows, each common prefix counted once per microbatch.
        computed: includes the padding of attention calls and for sequence parallelism, and empty microbatches.
    """
    add_to(sums, "work/rows", torch.tensor(tokens))
    add_to(sums, "work/distinct", torch.tensor(distinct))
    add_to(sums, "work/computed", torch.tensor(computed))


def reduce_sums(engine: TrainEngine, world: World, ranks: Sequence[int], sums: dict[str, Tensor]) -> dict[str, float]:
    """All-reduce sums and maxima (`max/NAME`) over the data shards; the result is the same on every rank of the role.

    float64, on the host. Collective over `ranks`, the role's. A name missing on a rank counts as 0 there, in a maximum as
    minus infinity.
    """
    sums = {name: value.cpu() for name, value in sums.items()}
    names = sorted({name for rank_names in all_gather(world, sorted(sums), ranks) for name in rank_names})
    minus_infinity = torch.tensor(-math.inf, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    sum_names = [name for name in names if not name.startswith("max/")]
    max_names = [name for name in names if name.startswith("max/")]
    totals = torch.stack([sums.get(name, zero) for name in sum_names] or [zero])
    maxima = torch.stack([sums.get(name, minus_infinity) for name in max_names] or [zero])
    engine.all_reduce_data(totals)
    engine.all_reduce_data(maxima, dist.ReduceOp.MAX)
    engine.broadcast_output(totals)
    engine.broadcast_output(maxima)
    return dict(zip(max_names, maxima.tolist(), strict=False)) | dict(zip(sum_names, totals.tolist(), strict=False))


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimizer step."""

    sums: Mapping[str, float]
    """Over its minibatch, by `kind/name`: token, row, max, work as above; `sum/loss`, which is already the minibatch's mean."""
    totals: Totals
    """Denominators of the `token/` and `row/` sums."""
    step: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step itself: grad_norm, lr; SKIPPED or EMPTY if the step was skipped."""

    @property
    def taken(self) -> bool:
        """Whether the weights were updated."""
        return not {SKIPPED, EMPTY} & self.step.keys()


def over_steps(reports: Sequence[StepReport]) -> dict[str, float]:
    """Metrics of an update from those of its optimizer steps.

    Per-token (or per-row) metrics are averaged over all trained tokens (or rows with one) of all steps, so minibatches with
    more tokens weigh more. `*_max` is the maximum, `padding` a fraction of all computed tokens, `shared_prefix` of the tokens of all rows, `tokens` a total; loss,
    grad_norm and lr are averaged over steps.

    `gap` is the first step's, when the policy still has the weights that the rollout sampled with. Skipped steps are
    counted; their metrics are reported only if every step was skipped.
    """
    row = {
        reason: sum(report.step.get(reason, 0.0) for report in reports)
        for reason in (SKIPPED, EMPTY)
        if any(reason in report.step for report in reports)
    }
    shown = [r for r in reports if r.taken] or [r for r in reports if SKIPPED in r.step] or list(reports)
    for key in dict.fromkeys(key for report in shown for key in report.sums):
        kind, _, name = key.partition("/")
        reporting = [report for report in shown if key in report.sums]
        if of_first_minibatch(name):
            reporting = reporting[:1]
        values = [report.sums[key] for report in reporting]
        if kind == "max":
            row[f"{name}_max"] = max(values)
        elif kind == "sum":
            row[name] = sum(values) / len(values)
        elif kind in ("token", "row"):
            count = sum(report.totals.tokens if kind == "token" else report.totals.rows for report in reporting)
            row[name] = sum(values) / max(count, 1.0)
    tokens, distinct, computed = (
        sum(report.sums.get(f"work/{name}", 0.0) for report in shown) for name in ("rows", "distinct", "computed")
    )
    if computed:
        row["padding"] = 1 - distinct / computed
        row["shared_prefix"] = 1 - distinct / tokens if tokens else 0.0
    for name in dict.fromkeys(name for report in shown for name in report.step if name not in (SKIPPED, EMPTY)):
        values = [report.step[name] for report in shown if name in report.step]
        row[name] = sum(values) / len(values)
    row["tokens"] = sum(report.totals.tokens for report in reports)
    return row
