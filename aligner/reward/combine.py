"""The components' raw values of one batch become its rewards: a pure function of the whole batch, in its row order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aligner.reward.config import RewardComponent


def combine(
    raw: Mapping[str, Tensor], status: Mapping[str, Tensor], components: Mapping[str, RewardComponent]
) -> tuple[Tensor, Tensor]:
    """Weighted sum with gates.

        R_b = sum over components c of  weight_c * (v_cb if raw_gb > gate_above_c else gate_value_c)
        v_c = raw_c, cut to clip_c, then (normalize: batch) (v_c - mean(v_c)) / std(v_c)

    with g the gate of c; a component without one always counts. Mean and standard deviation (of the population, n) are
    over all rows of the batch where raw_c is there; equal values become 0.

    A row needs a component that has a weight and whose gate is open, and the gate of any component with a weight. A row
    that lacks what it needs has no reward (NaN); nothing is ever filled in for a value that is not there.

    Args:
        raw: [B] of each component, every row of the batch; NaN where there is no value.
        status: [B] int8 `Status` of each component's rows.

    Returns:
        reward_B float32, and status_B int8: the worst status among what the row needs (failed before timeout before
        unparsable), 0 where it has its reward.
    """
    first = next(iter(raw.values()))
    total_B = torch.zeros(len(first), dtype=torch.float64)
    worst_B = torch.zeros(len(first), dtype=torch.int8)
    for name, component in components.items():
        if component.weight == 0:
            continue
        value_B, counts_B = prepared(raw[name], component), torch.ones(len(first), dtype=torch.bool)
        if component.gate is not None:
            gate_B = raw[component.gate].double()
            worst_B = _worse(worst_B, status[component.gate])
            counts_B = gate_B > component.gate_above
            value_B = torch.where(counts_B, value_B, component.gate_value)
            value_B = torch.where(gate_B.isnan(), gate_B, value_B)
        worst_B = _worse(worst_B, torch.where(counts_B, status[name], 0))
        total_B += component.weight * value_B
    assert torch.equal(total_B.isnan(), worst_B != 0), "a row lacks a reward without a status, or the reverse"
    return total_B.float(), worst_B


def _worse(one_B: Tensor, other_B: Tensor) -> Tensor:
    """The lower number, but 0 (ok) only where both are."""
    return torch.where(one_B == 0, other_B, torch.where(other_B == 0, one_B, torch.minimum(one_B, other_B)))


def prepared(raw_B: Tensor, component: RewardComponent) -> Tensor:
    """Clipped and normalized, float64. NaN stays NaN and enters no statistic."""
    value_B = raw_B.double()
    if component.clip is not None:
        value_B = value_B.clamp(*component.clip)
    if component.normalize == "none":
        return value_B
    there = value_B[~value_B.isnan()]
    if not len(there) or bool((there == there[0]).all()):
        return value_B - (there[0] if len(there) else 0.0)
    return (value_B - there.mean()) / there.std(correction=0)


def reward_row(
    reward_B: Tensor, status_B: Tensor, raw: Mapping[str, Tensor], status: Mapping[str, Tensor], kinds: Sequence[str]
) -> dict[str, float]:
    """What is logged of a batch's rewards: means over the rows that have a value, and how many rows lack one.

    Args:
        kinds: names of the statuses by number, ok first.

    Returns:
        reward and reward_<kind> of the total; with several components also reward/<name> (mean raw value) and
        reward/<name>_<kind> for each kind of failure.
    """
    row = {f"reward_{kind}": float((status_B == number).sum()) for number, kind in enumerate(kinds)}
    row["reward"] = _mean(reward_B)
    for name in raw if len(raw) > 1 else ():
        row[f"reward/{name}"] = _mean(raw[name])
        for number, kind in enumerate(kinds[1:], start=1):
            row[f"reward/{name}_{kind}"] = float((status[name] == number).sum())
    return row


def _mean(value_B: Tensor) -> float:
    return value_B.nanmean(dtype=torch.float64).item()
