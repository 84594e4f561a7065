"""Loss reduction: the weight of each token in the global batch, so that microbatches and data-parallel shards sum up."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Mean = Literal["token_mean", "sequence_mean", "fixed"]


def token_weights(
    mask_BT: Tensor,
    kind: Mean,
    *,
    total_tokens: float,
    total_rows: float,
    fixed_length: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w such that the sum of w * loss over the global batch is the requested mean.

        token_mean      w = mask / total_tokens                              mean over tokens (DAPO)
        sequence_mean   w = mask / (tokens in the row * total_rows)          mean over sequences of their means (GRPO)
        fixed           w = mask / (fixed_length * total_rows)               constant denominator, no length bias (Dr. GRPO)

    DAPO: Yu et al. 2025, arXiv 2503.14476, section 3.3. GRPO: Shao et al. 2024, arXiv 2402.03300, equation 3. Dr. GRPO:
    Liu et al. 2025, arXiv 2503.20783.

    The totals are counts over the GLOBAL batch (all ranks and microbatches of one optimizer step), so a token's weight
    does not depend on microbatching or sharding. (Dividing by each microbatch's own count and averaging would give a
    microbatch of short rows as much weight as one of long rows.) Gradients of shards are therefore summed, not averaged.

    Args:
        mask_BT: [B, T] bool, the trained tokens of these rows. A row without trained tokens has weight 0.
        total_tokens: trained tokens in the global batch.
        total_rows: rows in the global batch; the caller decides whether rows without trained tokens count.
        fixed_length: tokens, usually the longest response allowed; for "fixed" only.

    Returns:
        weight_BT: [B, T] of `dtype`, 0 outside the mask. With a total of 0, which implies that nothing is trained, all
            weights are 0 (a trained token would get NaN).

    Raises:
        ValueError: unknown `kind`, or "fixed" without a positive fixed_length.
    """
    assert mask_BT.ndim == 2, f"mask_BT must be [B, T], got {tuple(mask_BT.shape)}"
    assert mask_BT.dtype == torch.bool, f"mask_BT must be bool, got {mask_BT.dtype}"
    assert total_tokens >= 0 and total_rows >= 0, f"total_tokens={total_tokens}, total_rows={total_rows}"
    if kind not in get_args(Mean):
        raise ValueError(f"reduction={kind!r} is unknown; use one of {', '.join(get_args(Mean))}.")
    if kind == "fixed" and (fixed_length is None or not fixed_length > 0):
        raise ValueError(
            f"fixed_length={fixed_length} must be positive for reduction=fixed; use the longest response allowed."
        )

    if kind == "token_mean":
        weight_B1 = mask_BT.new_full((mask_BT.shape[0], 1), _inverse(total_tokens), dtype=torch.float64)
    elif kind == "fixed":
        assert fixed_length is not None
        weight_B1 = mask_BT.new_full((mask_BT.shape[0], 1), _inverse(fixed_length * total_rows), dtype=torch.float64)
    else:
        weight_B1 = _inverse(total_rows) / mask_BT.sum(dim=1, keepdim=True).double()
    # `where` and not a product: the weight of a row without trained tokens is infinite, that of an empty batch NaN.
    return torch.where(mask_BT, weight_B1, 0.0).to(dtype)


def _inverse(count: float) -> float:
    return 1.0 / count if count > 0 else math.nan
