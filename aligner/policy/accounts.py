"""What an update reports: sums over tokens and microbatches, then one row over its optimizer steps."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

MAXIMA = ("gap", "ratio", "kl")
"""Metrics of a loss whose largest token is reported beside the mean, as `<name>_max`."""


def gather_metrics(
    sums: dict[str, Tensor], metrics: dict[str, Tensor], topped: Container[str], mask_BT: Tensor
) -> None:
    """Add one microbatch's per-token metrics to the running sums, and those of `topped` to the running maxima."""
    for name, value_BT in metrics.items():
        kept = value_BT.detach()[mask_BT].double().cpu()
        sums[f"sum/{name}"] = sums.get(f"sum/{name}", torch.zeros((), dtype=torch.float64)) + kept.sum()
        if kept.numel() and name in topped:
            top = sums.get(f"max/{name}", kept[0])
            sums[f"max/{name}"] = torch.maximum(top, kept.max())


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """One row for the batch: means over its optimizer steps, maxima of `*_max`, totals of tokens.

    `gap` is the first step's: there the policy still has the weights that the rollout sampled with.
    """
    row: dict[str, float] = {}
    for name in steps[0]:
        values = [step[name] for step in steps if name in step]
        if name.startswith("gap"):
            row[name] = values[0]
        elif name.endswith("_max"):
            row[name] = max(values)
        elif name == "tokens":
            row[name] = sum(values)
        else:
            row[name] = sum(values) / len(values)
    return row
