"""Mean and standard deviation over a whole batch of which each shard sees a part, the same however it was cut.

moments_B3 = row_moments(value_BT, mask_BT)         on every shard, for its rows
mean, std  = combine(moments_B3)                    of all rows, on every rank
value_BT   = whiten(value_BT, mask_BT, mean=mean, std=std)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aligner.objective.masked import inside


class Moments(NamedTuple):
    """How many values, their mean, and the sum of their squared distances from it; plain numbers, of any batch."""

    n: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """The sample standard deviation (n - 1); 0 for fewer than 2 values."""
        return math.sqrt(self.m2 / (self.n - 1.0)) if self.n > 1.0 else 0.0


def row_moments(value: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared distances from the mean, of each row by itself.

    Args:
        value: [B, T] or [B], floating. mask: bool of the same shape, outside of which value may hold anything.

    Returns:
        moments_B3: [B, 3] float64; zeros for a row without a value. A row's numbers depend on nothing but the row, so
        that rows can be brought together from any shards.
    """
    assert value.ndim in (1, 2) and mask.shape == value.shape, f"{tuple(value.shape)}, {tuple(mask.shape)}"
    assert mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"
    mask_BT, value_BT = (given if given.ndim == 2 else given[:, None] for given in (mask, value.detach()))
    value_BT = inside(mask_BT, value_BT.double())
    count_B1 = mask_BT.sum(dim=1, keepdim=True).double()
    mean_B1 = value_BT.sum(dim=1, keepdim=True) / count_B1.clamp(min=1)
    m2_B1 = inside(mask_BT, value_BT - mean_B1).square().sum(dim=1, keepdim=True)
    return torch.cat([count_B1, mean_B1, m2_B1], dim=1)


def merge(moments_N3: Tensor) -> Moments:
    """The moments of N sets of values taken as one set (Chan, Golub and LeVeque 1983, equation 2.1, for N sets).

    It adds no large squares that would then have to cancel, so that values around 1e6 keep their deviation.

    Args:
        moments_N3: [N, 3], one set a row, empty ones included.
    """
    assert moments_N3.ndim == 2 and moments_N3.shape[1] == 3, f"moments must be [N, 3], got {tuple(moments_N3.shape)}"
    count_N, mean_N, m2_N = moments_N3.double().unbind(dim=1)
    count = count_N.sum()
    mean = (count_N * mean_N).sum() / count.clamp(min=1)
    m2 = (m2_N + count_N * (mean_N - mean).square()).sum()
    return Moments(float(count), float(mean), float(m2))


def combine(moments_B3: Tensor) -> tuple[float, float]:
    """(mean, sample standard deviation) over every value of every row; (0, 0) where there is none."""
    merged = merge(moments_B3)
    return merged.mean, merged.std


def whiten(value: Tensor, mask: Tensor, *, mean: float, std: float, epsilon: float = 1e-8) -> Tensor:
    """(value - mean) / (std + epsilon) where the mask holds, 0 elsewhere.

    Args:
        value: [B, T] or [B], floating. mask: bool of the same shape, outside of which value may hold anything.
        mean, std: of the global batch, from `combine`, in the unit of value. A mean of 0 divides alone, as for rewards,
            whose zero means something.
        epsilon: added to std, in the unit of value; it is what keeps a batch of equal values at 0.

    Returns:
        The shape and dtype of value, without gradient, in standard deviations.
    """
    assert value.shape == mask.shape and mask.dtype == torch.bool, f"{tuple(value.shape)}, {tuple(mask.shape)}"
    # In float64, since the mean may be large beside the deviation.
    return inside(mask, (value.detach().double() - mean) / (std + epsilon)).to(value.dtype)
