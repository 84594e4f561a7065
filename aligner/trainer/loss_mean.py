"""The mean of a loss over the global batch, as parts that microbatches and data shards add up to."""

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
"""(result, mask_BT=..., fields by name) -> (loss, metrics), each [B, T] per token or [B] per row."""


@dataclass(frozen=True)
class Totals:
    """Counts over the global batch of one optimizer step: every data shard, every microbatch."""

    tokens: float
    """Trained tokens."""
    rows: float
    """Rows with a trained token."""


def takes_one_step(loss: LossFunction) -> bool:
    """Whether a loss is right only at the weights that sampled: the attribute `one_step` of the function under a partial."""
    return bool(attribute_of(loss, "one_step", False))


def rows_together(loss: LossFunction) -> int:
    """How many consecutive rows the loss compares: the attribute of this name on the function, 1 where it has none."""
    return int(attribute_of(loss, "rows_together", 1))


def counted(loss: LossFunction, mask_BT: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """[B, T] bool: `mask_BT` without the rows that the loss leaves out, which must not count in its mean either.

    A function that leaves out rows with trained tokens (a pair's, whose other row has none) has the attribute
    `counted_rows`: (mask_BT, <fields it names>) -> bool [B]. Without one every row with a trained token counts.
    """
    rows = attribute_of(loss, "counted_rows", None)
    if rows is None:
        return mask_BT
    wanted = inspect.signature(rows).parameters
    kept_B: Tensor = rows(mask_BT, **{name: value for name, value in fields.items() if name in wanted})
    return mask_BT & kept_B[:, None]


def attribute_of(loss: Any, name: str, default: Any) -> Any:
    """An attribute of the function under any partials."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, name, default)


def global_mean(loss: Tensor, mask_BT: Tensor, totals: Totals, config: TrainingConfig, max_response: int) -> Tensor:
    """This microbatch's part of the mean of the loss over the global batch.

    Args:
        loss: [B, T], weighted by `config.reduction`; or [B], the mean over the rows with a trained token, whatever the
            others hold.
        mask_BT: [B, T] bool, the trained tokens.
        max_response: tokens that reduction=fixed divides by where config.fixed_length is 0.
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
    # `where`, because a loss of one's own may leave anything outside the mask
    return (torch.where(mask_BT, loss, 0.0) * weight_BT).sum()
