"""pass@k: the probability that at least one of k samples succeeds, estimated without bias from n samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pass_at_k(success_PG: Tensor, k: int) -> float:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k), c of whose n samples succeed (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
        success_PG: 1 or 0; NaN where a sample has no result and does not count.
        k: at least 1. Prompts with fewer results are left out.

    Returns:
        NaN where no prompt has k results.
    """
    assert success_PG.dim() == 2, f"{tuple(success_PG.shape)} is not [P, G]"
    counted_PG = ~torch.isnan(success_PG)
    results_P = counted_PG.sum(1).tolist()
    successes_P = (success_PG.nan_to_num() > 0).sum(1).tolist()
    estimates = [
        1.0 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(results_P, successes_P, strict=True) if n >= k
    ]
    return sum(estimates) / len(estimates) if estimates else math.nan
