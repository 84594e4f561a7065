"""What an update reports: sums over tokens, rows and microbatches, then one row over its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aligner.policy.calls import attended
from aligner.policy.global_mean import Totals
from aligner.policy.skips import EMPTY, SKIPPED
from aligner.spmd import columns

MAXIMA = ("gap", "ratio", "kl", "weight", "staleness")
"""Metrics of a loss whose largest token (or row) is reported beside the mean, as `<name>_max`."""


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a running sum, in float64 on the host."""
    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu()


def gather_metrics(sums: dict[str, Tensor], metrics: dict[str, Tensor], mask_BT: Tensor) -> None:
    """Add one microbatch's metrics to the running sums (`token/` of those that are [B, T], `row/` of those that are
    [B]), and those of MAXIMA to the running maxima."""
    for name, value in metrics.items():
        per_row = value.dim() == 1
        kept = value.detach()[mask_BT.any(1) if per_row else mask_BT].double().cpu()
        add_to(sums, f"{'row' if per_row else 'token'}/{name}", kept.sum())
        if kept.numel() and name in MAXIMA:
            top = sums.get(f"max/{name}", kept[0])
            sums[f"max/{name}"] = torch.maximum(top, kept.max())


def gather_advantages(sums: dict[str, Tensor], fields: Mapping[str, Any], mask_BT: Tensor) -> None:
    """The largest magnitude of an advantage of a trained token, where the loss is given any: `advantage_abs_max`."""
    found = [fields[name] for name in ("advantage_B", "advantage_BT") if isinstance(fields.get(name), Tensor)]
    for value in found:
        one_BT = columns.fit(value, mask_BT.shape[1]) if value.dim() == 2 else value[:, None].expand(mask_BT.shape)
        kept = one_BT[mask_BT].abs()
        sums["max/advantage_abs"] = kept.max().double().cpu() if kept.numel() else torch.zeros((), dtype=torch.float64)


def account_work(sums: dict[str, Tensor], tokens: int, microbatches: Sequence[tuple[int, ...]]) -> None:
    """Add a shard's tokens, and those that were computed: with what pads attention calls, sequence-parallel ranks and
    microbatches that are there for other shards' collectives.

    Args:
        microbatches: lengths of the rows of each, what pads them among them.
    """
    add_to(sums, "work/rows", torch.tensor(tokens))
    add_to(sums, "work/computed", torch.tensor(sum(attended(lengths) for lengths in microbatches)))


def means(sums: dict[str, float], totals: Totals) -> dict[str, float]:
    """The global batch's sums by their kind -> what is reported; `sum/` stays as it is."""
    count = {"sum": 1.0, "token": max(totals.tokens, 1.0), "row": max(totals.rows, 1.0)}
    found: dict[str, float] = {}
    work: dict[str, float] = {}
    for key, value in sums.items():
        kind, _, name = key.partition("/")
        if kind == "max":
            found[f"{name}_max"] = value
        elif kind == "work":
            work[name] = value
        else:
            found[name] = value / count[kind]
    if work:
        found["padding"] = 1 - work["rows"] / work["computed"]
    return found


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """One row for the batch: means over its optimizer steps, maxima of `*_max`, totals of tokens.

    `gap` is the first step's: there the policy still has the weights that the rollout sampled with. Steps that were left
    out are counted, and their numbers show only where no step was taken.
    """
    row: dict[str, float] = {}
    for reason in (SKIPPED, EMPTY):
        if any(reason in step for step in steps):
            row[reason] = sum(step.get(reason, 0.0) for step in steps)
    left_out = row.keys()
    taken = [step for step in steps if not left_out & step.keys()] or [s for s in steps if SKIPPED in s] or steps
    for name in (name for name in taken[0] if name not in (SKIPPED, EMPTY)):
        values = [step[name] for step in taken if name in step]
        if name.startswith("gap"):
            row[name] = values[0]
        elif name.endswith("_max"):
            row[name] = max(values)
        elif name == "tokens":
            row[name] = sum(step[name] for step in steps)
        else:
            row[name] = sum(values) / len(values)
    return row
