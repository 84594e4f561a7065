"""Loss functions, and their mean over the global batch as a sum over microbatches and data-parallel ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligner.objective.reduction import token_weights
from aligner.trainer.config import TrainingConfig

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(readout, mask_BT=..., fields by name) -> (loss, metrics), each [B, T] per token or [B] per row."""


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch of one optimizer step: all data-parallel ranks, all microbatches."""

    tokens: float
    """Trained tokens."""
    rows: float
    """Rows with a trained token."""


def takes_one_step(loss: LossFunction) -> bool:
    """Whether a loss is valid only for samples of the current weights: the function's attribute `one_step`, false by default."""
    return bool(attribute_of(loss, "one_step", False))


def rows_together(loss: LossFunction) -> int:
    """Number of consecutive rows that the loss compares: the function's attribute `rows_together`, 1 by default."""
    return int(attribute_of(loss, "rows_together", 1))


def counted(loss: LossFunction, mask_BT: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """[B, T] bool: `mask_BT` without the rows that the loss ignores, so that they do not count in its mean.

    A loss that ignores rows with trained tokens (such as the row of a pair whose other row has none) has the attribute
    `counted_rows`: (mask_BT, <fields it names>) -> bool [B]. By default every row with a trained token counts.
    """
    counted_rows = attribute_of(loss, "counted_rows", None)
    if counted_rows is None:
        return mask_BT
    parameters = inspect.signature(counted_rows).parameters
    kept_B: Tensor = counted_rows(mask_BT, **{name: value for name, value in fields.items() if name in parameters})
    return mask_BT & kept_B[:, None]


def attribute_of(loss: Any, name: str, default: Any) -> Any:
    """An attribute of the function inside any `functools.partial`s."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, name, default)


def global_mean(loss: Tensor, mask_BT: Tensor, totals: Totals, config: TrainingConfig, max_response: int) -> Tensor:
    """This microbatch's contribution to the mean of the loss over the global batch: a scalar.

    Args:
        loss: [B, T], averaged by `config.reduction`; or [B], averaged over the rows with a trained token (values of other
            rows are ignored).
        mask_BT: [B, T] bool, true at trained tokens.
        max_response: number of tokens that reduction=fixed divides by if config.fixed_length is 0.
    """
    if loss.dim() == 1:
        assert loss.shape == mask_BT.shape[:1], f"the loss is {tuple(loss.shape)} for {len(mask_BT)} rows"
        return torch.where(mask_BT.any(1), loss, 0.0).sum() / max(totals.rows, 1.0)
    weight_BT = token_weights(
        mask_BT,
        config.reduction,  # type: ignore[arg-type]
        total_tokens=totals.tokens,
        total_rows=totals.rows,
        fixed_length=config.fixed_length or max_response or None,
    )
    # `where`: a user's loss may hold anything, NaN too, outside the mask
    return (torch.where(mask_BT, loss, 0.0) * weight_BT).sum()
