"""What one token weighs in the global batch's loss, so that microbatches and data-parallel shards simply add up."""

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
    """Weights w such that the sum of w * loss over every row of the global batch is the wanted mean.

        token_mean      w = mask / total_tokens                              every token alike (DAPO)
        sequence_mean   w = mask / (tokens in the row * total_rows)          every row alike (GRPO)
        fixed           w = mask / (fixed_length * total_rows)               no bias by length (Dr. GRPO)

    DAPO: Yu et al. 2025, arXiv 2503.14476, section 3.3. GRPO: Shao et al. 2024, arXiv 2402.03300, equation 3. Dr. GRPO:
    Liu et al. 2025, arXiv 2503.20783.

    The totals are counts over the GLOBAL batch (every rank, every microbatch of one optimizer step), so a token's
    weight does not depend on how the batch was cut. Dividing by a microbatch's own count and averaging would: a
    microbatch of short rows would count as much as one of long rows. So gradients of shards are summed, never averaged.

    Args:
        mask_BT: [B, T] bool, the trained tokens of these rows. A row without one weighs 0 everywhere.
        total_tokens: trained tokens in the global batch.
        total_rows: rows in the global batch; whether rows without a trained token count is the caller's choice.
        fixed_length: tokens, usually the longest response allowed; "fixed" only.

    Returns:
        weight_BT: [B, T] of `dtype`, 0 outside the mask. A total of 0 gives zeros on a batch without a trained token,
            which can be, and NaN on any trained token, which cannot.

    Raises:
        ValueError: an unknown `kind`, or "fixed" without a positive fixed_length.
    """
    assert mask_BT.ndim == 2, f"mask_BT must be [B, T], got {tuple(mask_BT.shape)}"
    assert mask_BT.dtype == torch.bool, f"mask_BT must be bool, got {mask_BT.dtype}"
    assert total_tokens >= 0 and total_rows >= 0, f"total_tokens={total_tokens}, total_rows={total_rows}"
    if kind not in get_args(Mean):
        raise ValueError(f"reduction={kind!r} is not known; use one of {', '.join(get_args(Mean))}.")
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
    # `where`, because the weight of a row without a token is infinite and that of an empty batch is NaN.
    return torch.where(mask_BT, weight_B1, 0.0).to(dtype)


def _inverse(count: float) -> float:
    return 1.0 / count if count > 0 else math.nan
