"""What is trained and what is not: the mask on values, sums along a row, and the shapes that every loss asserts."""

import torch
from torch import Tensor

FAR = 1e30
"""nats; a million of them, and their mean, are still numbers in float32."""


def inside(mask: Tensor, value: Tensor) -> Tensor:
    """`value` where `mask` holds, 0 elsewhere; `where`, unlike a product, also stops NaN and inf, both ways."""
    return torch.where(mask, value, 0.0)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """one - other, and 0 without a gradient where both are the same infinity.

    A token that a model holds for impossible has a log-probability of -inf; where two models agree in that, their ratio
    is that of two equal numbers, and not NaN.
    """
    alike = torch.isinf(one) & (one == other)
    return one.masked_fill(alike, 0.0) - other.masked_fill(alike, 0.0)


def bounded(log_ratio: Tensor) -> Tensor:
    """Infinite log-ratios as ones so large that nothing can make up for them, whose sums are numbers all the same."""
    return log_ratio.clamp(-FAR, FAR)


def row_sums(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sums over a row's trained tokens, such as log p(response) of its tokens' log-probabilities.

    In float64, because the log-probability of a long response is in the thousands, where float32 resolves 1e-4, and
    what a preference loss needs is the small difference of two of them.

    Args:
        value_BT: [B, T] floating. mask_BT: [B, T] bool, outside of which value_BT may hold anything.

    Returns:
        sum_B: [B] float64, 0 for a row without a trained token.
    """
    assert value_BT.ndim == 2 and mask_BT.shape == value_BT.shape, f"{tuple(value_BT.shape)}, {tuple(mask_BT.shape)}"
    return inside(mask_BT, value_BT.double()).sum(dim=1)


def check_tokens(name: str, value_BT: Tensor, mask_BT: Tensor, *others_BT: Tensor | None) -> None:
    """Asserts what holds for every loss: [B, T] of one shape, float32 or float64, and a mask of bools."""
    assert value_BT.ndim == 2, f"{name} must be [B, T], got {tuple(value_BT.shape)}"
    # bfloat16 resolves a log-probability of 8 to 0.03: its ratios are noise.
    assert value_BT.dtype in (torch.float32, torch.float64), f"{name} is {value_BT.dtype}"
    assert mask_BT.dtype == torch.bool, f"mask_BT must be bool, got {mask_BT.dtype}"
    for other_BT in (mask_BT, *others_BT):
        assert other_BT is None or other_BT.shape == value_BT.shape, (
            f"an input is {tuple(other_BT.shape)}, {name} {tuple(value_BT.shape)}"
        )


def check_rows(name: str, value_B: Tensor | None, rows: int) -> None:
    """Asserts one number a row."""
    assert value_B is None or value_B.shape == (rows,), f"{name} is {tuple(value_B.shape)}, for {rows} rows"
