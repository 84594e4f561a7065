"""What an update reports: sums over tokens, rows and microbatches, then one row over its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aligner.report.metric_registry import has_max, of_first_minibatch
from aligner.spmd import batch_ops
from aligner.trainer.loss_mean import Totals
from aligner.trainer.skips import EMPTY, SKIPPED


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a running sum, in float64 on the host."""
    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu()


def gather_metrics(sums: dict[str, Tensor], metrics: dict[str, Tensor], mask_BT: Tensor) -> None:
    """Add one microbatch's metrics to the running sums (`token/` of those that are [B, T], `row/` of those that are
    [B]), and the largest of those that are declared with `also_max` to the running maxima."""
    for name, value in metrics.items():
        per_row = value.dim() == 1
        kept = value.detach()[mask_BT.any(1) if per_row else mask_BT].double().cpu()
        add_to(sums, f"{'row' if per_row else 'token'}/{name}", kept.sum())
        if kept.numel() and has_max(name):
            top = sums.get(f"max/{name}", kept[0])
            sums[f"max/{name}"] = torch.maximum(top, kept.max())


def gather_advantages(sums: dict[str, Tensor], fields: Mapping[str, Any], mask_BT: Tensor) -> None:
    """The largest magnitude of an advantage of a trained token, where the loss is given any: `advantage_abs_max`."""
    given = (fields.get(name) for name in ("advantage_B", "advantage_BT"))
    for value in (value for value in given if isinstance(value, Tensor)):
        one_BT = batch_ops.fit(value, mask_BT.shape[1]) if value.dim() == 2 else value[:, None].expand(mask_BT.shape)
        kept = one_BT[mask_BT].abs()
        sums["max/advantage_abs"] = kept.max().double().cpu() if kept.numel() else torch.zeros((), dtype=torch.float64)


def account_work(sums: dict[str, Tensor], tokens: int, distinct: int, computed: int) -> None:
    """Add a shard's tokens, and those that its engine computed for them, for the metrics `shared_prefix` and `padding`.

    Args:
        tokens: of the rows.
        distinct: of the rows, those that several rows of a microbatch share counted once.
        computed: with what pads attention calls, sequence-parallel ranks and microbatches that are there for other
            shards' collectives.
    """
    add_to(sums, "work/rows", torch.tensor(tokens))
    add_to(sums, "work/distinct", torch.tensor(distinct))
    add_to(sums, "work/computed", torch.tensor(computed))


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step has to say."""

    sums: Mapping[str, float]
    """Over its minibatch, by `kind/name`: token, row, max, work as above; `sum/loss`, which is the minibatch's mean already."""
    totals: Totals
    """What the minibatch's tokens and rows are to be divided by."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the step itself: grad_norm, lr; SKIPPED or EMPTY where no step was taken."""

    @property
    def taken(self) -> bool:
        """Whether the weights have moved."""
        return not {SKIPPED, EMPTY} & self.own.keys()


def over_steps(steps: Sequence[StepReport]) -> dict[str, float]:
    """One row for the batch of these steps.

    What is one number a token (or a row) is the mean over every trained token (or row with one) that the steps saw, as if
    they had been one: minibatches of more tokens weigh more. `*_max` is the largest, `padding` the share of all that was
    computed, `shared_prefix` that of all rows' tokens, `tokens` a total; loss, grad_norm and lr are numbers of a step, and the mean is over steps.

    `gap` is the first step's: there the policy still has the weights that the rollout sampled with. Steps that were left
    out are counted, and their numbers show only where no step was taken.
    """
    row = {
        reason: sum(step.own.get(reason, 0.0) for step in steps)
        for reason in (SKIPPED, EMPTY)
        if any(reason in step.own for step in steps)
    }
    shown = [s for s in steps if s.taken] or [s for s in steps if SKIPPED in s.own] or list(steps)
    for key in dict.fromkeys(key for step in shown for key in step.sums):
        kind, _, name = key.partition("/")
        having = [step for step in shown if key in step.sums]
        if of_first_minibatch(name):
            having = having[:1]
        values = [step.sums[key] for step in having]
        if kind == "max":
            row[f"{name}_max"] = max(values)
        elif kind == "sum":
            row[name] = sum(values) / len(values)
        elif kind in ("token", "row"):
            count = sum(step.totals.tokens if kind == "token" else step.totals.rows for step in having)
            row[name] = sum(values) / max(count, 1.0)
    tokens, distinct, computed = (
        sum(step.sums.get(f"work/{name}", 0.0) for step in shown) for name in ("rows", "distinct", "computed")
    )
    if computed:
        row["padding"] = 1 - distinct / computed
        row["shared_prefix"] = 1 - distinct / tokens
    for name in dict.fromkeys(name for step in shown for name in step.own if name not in (SKIPPED, EMPTY)):
        values = [step.own[name] for step in shown if name in step.own]
        row[name] = sum(values) / len(values)
    row["tokens"] = sum(step.totals.tokens for step in steps)
    return row
