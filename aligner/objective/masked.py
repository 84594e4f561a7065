"""Masking, NaN-safe differences, row sums, and the shape checks that all losses share."""

import torch
from torch import Tensor

MAX_ABS_LOG_RATIO = 1e30
"""nats; a sum of a million of them is still finite in float32."""


def apply_mask(mask: Tensor, value: Tensor) -> Tensor:
    """`value` where `mask` is True, else 0. Unlike a product, `where` also stops NaN and inf, in values and gradients."""
    return torch.where(mask, value, 0.0)


def difference(left: Tensor, right: Tensor) -> Tensor:
    """left - right, but 0 without a gradient (not NaN) where both are the same infinity.

    A token of probability 0 has a log-probability of -inf; where two models agree on that their ratio is 1.
    """
    alike = torch.isinf(left) & (left == right)
    return left.masked_fill(alike, 0.0) - right.masked_fill(alike, 0.0)


def clamp_infinite(log_ratio: Tensor) -> Tensor:
    """Clamp infinite log-ratios to values that dominate any sum but keep it finite."""
    return log_ratio.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)


def row_sums(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over each row's trained tokens, such as log p(response) from token log-probabilities.

    float64, because the log-probability of a long response is in the thousands, where float32 resolves only 1e-4, and
    preference losses need the small difference of two such sums.

    Args:
        value_BT: [B, T] floating. mask_BT: [B, T] bool; outside the mask value_BT may hold any value.

    Returns:
        sum_B: [B] float64, 0 for a row without a trained token.
    """
    assert value_BT.ndim == 2 and mask_BT.shape == value_BT.shape, f"{tuple(value_BT.shape)}, {tuple(mask_BT.shape)}"
    return apply_mask(mask_BT, value_BT.double()).sum(dim=1)


def check_tokens(name: str, value_BT: Tensor, mask_BT: Tensor, *others_BT: Tensor | None) -> None:
    """Asserts that all inputs are [B, T] of one shape, `value_BT` is float32 or float64, and the mask is bool."""
    assert value_BT.ndim == 2, f"{name} must be [B, T], got {tuple(value_BT.shape)}"
    # bfloat16 resolves a log-probability of 8 only to 0.03: its ratios would be noise.
    assert value_BT.dtype in (torch.float32, torch.float64), f"{name} is {value_BT.dtype}"
    assert mask_BT.dtype == torch.bool, f"mask_BT must be bool, got {mask_BT.dtype}"
    for other_BT in (mask_BT, *others_BT):
        assert other_BT is None or other_BT.shape == value_BT.shape, (
            f"an input is {tuple(other_BT.shape)}, {name} {tuple(value_BT.shape)}"
        )


def check_rows(name: str, value_B: Tensor | None, rows: int) -> None:
    """Asserts that `value_B`, if given, is [rows]."""
    assert value_B is None or value_B.shape == (rows,), f"{name} is {tuple(value_B.shape)} for {rows} rows"
