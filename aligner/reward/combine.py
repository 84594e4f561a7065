"""Combine the components' raw values of a global batch into rewards: weights, normalisation, clipping, gates. Pure."""

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

    where g is the gate of c; a component without a gate always counts. Mean and (population) standard deviation are over
    all rows of the batch that have a value; equal values become 0.

    A row needs the gates of all components with a weight, and the components with a weight whose gates are open. If one
    of those values is missing the row has no reward (NaN); missing values are never filled in.

    Args:
        raw: component -> [B], all rows of the global batch; NaN for missing values.
        status: component -> [B] int8 `Status`.
        components: component -> settings.

    Returns:
        reward_B, float32; status_B, int8: the worst status among the values that the row needs (failed before timeout
        before unparsable), 0 if it has a reward.
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


def _worse(left_B: Tensor, right_B: Tensor) -> Tensor:
    """The lower status number, ignoring 0 (ok) unless both are 0."""
    return torch.where(left_B == 0, right_B, torch.where(right_B == 0, left_B, torch.minimum(left_B, right_B)))


def prepared(raw_B: Tensor, component: RewardComponent) -> Tensor:
    """Clipped and normalized values, [B] float64. NaN stays NaN and is excluded from the statistics."""
    value_B = raw_B.double()
    if component.clip is not None:
        value_B = value_B.clamp(*component.clip)
    if component.normalize == "none":
        return value_B
    present = value_B[~value_B.isnan()]
    if not len(present) or bool((present == present[0]).all()):
        return value_B - (present[0] if len(present) else 0.0)
    return (value_B - present.mean()) / present.std(correction=0)


def reward_row(
    reward_B: Tensor, status_B: Tensor, raw: Mapping[str, Tensor], status: Mapping[str, Tensor], kinds: Sequence[str]
) -> dict[str, float]:
    """Metrics of a batch's rewards: means over the rows that have a value, and counts of rows by status.

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
