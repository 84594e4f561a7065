"""Mean and standard deviation over a global batch that is sharded by rows; the result does not depend on the sharding.

moments_B3 = row_moments(value_BT, mask_BT)         on each shard, for its rows
mean, std  = mean_and_std(moments_B3)               from the moments of all rows, on every rank
value_BT   = whiten(value_BT, mask_BT, mean=mean, std=std)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aligner.objective.masked import apply_mask


class Moments(NamedTuple):
    """Count, mean, and sum of squared deviations from the mean (Welford), as floats."""

    n: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """The sample standard deviation (n - 1); 0 for fewer than 2 values."""
        return math.sqrt(self.m2 / (self.n - 1.0)) if self.n > 1.0 else 0.0


def row_moments(value: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations from the mean of each row.

    Args:
        value: [B, T] or [B], floating. mask: bool of the same shape; outside the mask value may hold any value.

    Returns:
        moments_B3: [B, 3] float64; zeros for a row without values. Each row depends on nothing else, so the moments of
        all rows can be gathered from any sharding.
    """
    assert value.ndim in (1, 2) and mask.shape == value.shape, f"{tuple(value.shape)}, {tuple(mask.shape)}"
    assert mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"
    mask_BT, value_BT = (tensor if tensor.ndim == 2 else tensor[:, None] for tensor in (mask, value.detach()))
    value_BT = apply_mask(mask_BT, value_BT.double())
    count_B1 = mask_BT.sum(dim=1, keepdim=True).double()
    mean_B1 = value_BT.sum(dim=1, keepdim=True) / count_B1.clamp(min=1)
    m2_B1 = apply_mask(mask_BT, value_BT - mean_B1).square().sum(dim=1, keepdim=True)
    return torch.cat([count_B1, mean_B1, m2_B1], dim=1)


def merge_moments(moments_N3: Tensor) -> Moments:
    """The moments of the union of N sets of values (Chan, Golub and LeVeque 1983, equation 2.1, for N sets).

    Free of cancellation of large squares, so that values around 1e6 keep an accurate deviation.

    Args:
        moments_N3: [N, 3], one set per row; sets may be empty.
    """
    assert moments_N3.ndim == 2 and moments_N3.shape[1] == 3, f"moments must be [N, 3], got {tuple(moments_N3.shape)}"
    count_N, mean_N, m2_N = moments_N3.double().unbind(dim=1)
    count = count_N.sum()
    mean = (count_N * mean_N).sum() / count.clamp(min=1)
    m2 = (m2_N + count_N * (mean_N - mean).square()).sum()
    return Moments(float(count), float(mean), float(m2))


def mean_and_std(moments_B3: Tensor) -> tuple[float, float]:
    """(mean, sample standard deviation) over all values of all rows; (0, 0) if there are none."""
    merged = merge_moments(moments_B3)
    return merged.mean, merged.std


def whiten(value: Tensor, mask: Tensor, *, mean: float, std: float, epsilon: float = 1e-8) -> Tensor:
    """(value - mean) / (std + epsilon) where the mask holds, 0 elsewhere.

    Args:
        value: [B, T] or [B], floating. mask: bool of the same shape; outside the mask value may hold any value.
        mean, std: of the global batch, from `mean_and_std`, in the unit of value. Pass mean=0 to scale only.
        epsilon: added to std, in the unit of value; avoids a division by 0 for a batch of equal values.

    Returns:
        Shape and dtype of value, no gradient, in standard deviations.
    """
    assert value.shape == mask.shape and mask.dtype == torch.bool, f"{tuple(value.shape)}, {tuple(mask.shape)}"
    # float64, since the mean may be much larger than the deviation.
    return apply_mask(mask, (value.detach().double() - mean) / (std + epsilon)).to(value.dtype)
