"""Pairs to test with: of unequal length, after prompts of unequal length, with holes."""

import torch
from torch import Tensor

from aligner.objective.masked import row_sums


def ragged(seed: int, pairs: int = 3, length: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """`pairs` pairs, and the sums of a reference that is near the policy."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(2 * pairs, length, generator=generator) < 0.6
    mask_BT[:, 0], mask_BT[:, 1] = False, True
    logp_BT = -torch.rand(2 * pairs, length, generator=generator, dtype=torch.float64) * 3
    reference_BT = logp_BT + torch.randn(2 * pairs, length, generator=generator, dtype=torch.float64)
    return {
        "policy_logp_BT": logp_BT.to(dtype).requires_grad_(),
        "mask_BT": mask_BT,
        "reference_sum_B": row_sums(reference_BT, mask_BT).to(dtype),
    }
