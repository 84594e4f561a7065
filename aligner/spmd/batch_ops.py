"""Row operations on a batch (a tensor [B, ...], a list of B items, or a dict or frozen dataclass of these): take, join, pad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def take(value: Any, positions: Sequence[int]) -> Any:
    """The rows at `positions`, in that order."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[torch.as_tensor(positions, dtype=torch.long)]
    if isinstance(value, list):
        return [value[i] for i in positions]
    if isinstance(value, dict):
        return {name: take(part, positions) for name, part in value.items()}
    assert dataclasses.is_dataclass(value) and not isinstance(value, type), f"{type(value).__name__} is not row-wise"
    fields = {f.name: take(getattr(value, f.name), positions) for f in dataclasses.fields(value)}
    return type(value)(**fields)


def join(parts: Sequence[Any]) -> Any:
    """Row-wise concatenation; [B, T] tensors are right-padded with 0 to the widest.

    A dataclass field whose metadata has "absent" may be None in some parts: its rows there have that value.
    """
    first = parts[0]
    if first is None:
        assert all(part is None for part in parts), "some parts hold a value that others lack"
        return None
    if isinstance(first, Tensor):
        if first.dim() >= 2:
            width = max(part.shape[1] for part in parts)
            parts = [_widen(part, width) for part in parts]
        return torch.cat(list(parts))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, dict):
        return {name: join([part[name] for part in parts]) for name in first}
    return type(first)(**{f.name: _join_field(parts, f) for f in dataclasses.fields(first)})


def _join_field(parts: Sequence[Any], declared: dataclasses.Field[Any]) -> Any:
    values = [getattr(part, declared.name) for part in parts]
    present = next((value for value in values if isinstance(value, Tensor)), None)
    if "absent" in declared.metadata and present is not None:
        absent = declared.metadata["absent"]
        values = [
            present.new_full(_shape(part, present.dim()), absent) if value is None else value
            for part, value in zip(parts, values, strict=True)
        ]
    return join(values)


def _shape(part: Any, dims: int) -> torch.Size:
    """[B] or [B, T, ...] of a dataclass: that of its first tensor with so many dimensions."""
    values = (getattr(part, f.name) for f in dataclasses.fields(part))
    return next(value.shape for value in values if isinstance(value, Tensor) and value.dim() == dims)


def fit_width(value: Any, width: int) -> Any:
    """Cut or zero-pad every [B, T] tensor to T = `width`, so that values of the same rows have one shape."""
    if isinstance(value, Tensor):
        return value if value.dim() < 2 or value.shape[1] == width else _widen(value[:, :width], width)
    if isinstance(value, dict):
        return {name: fit_width(part, width) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: fit_width(getattr(value, f.name), width) for f in dataclasses.fields(value)})
    return value


def _widen(part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[1]
    if missing == 0:
        return part
    return torch.cat([part, part.new_zeros((part.shape[0], missing, *part.shape[2:]))], 1)
