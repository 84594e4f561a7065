"""Reward shaping per row, before advantages: overlong penalty and running scale."""

import torch
from torch import Tensor

from aligner.objective.masked import check_rows
from aligner.objective.moments import Moments, merge_moments, row_moments


def overlong_penalty(length_B: Tensor, *, max_length: int, buffer: int | None = None) -> Tensor:
    """DAPO's soft overlong punishment, a term to add to the reward: Yu et al. 2025, arXiv 2503.14476, equation 13.

         0                                      length <= max_length - buffer
        (max_length - buffer - length) / buffer     in between
        -1                                      length >  max_length

    Args:
        length_B: [B] integer, response length in tokens.
        max_length: L_max, tokens.
        buffer: L_cache, the last tokens before max_length over which the penalty grows; 0: a step; None: a fifth of
            max_length, as in the paper.

    Returns:
        penalty_B: [B] float32, from -1 to 0.

    Raises:
        ValueError: buffer outside [0, max_length].
    """
    assert length_B.ndim == 1 and not length_B.is_floating_point(), f"{tuple(length_B.shape)}, {length_B.dtype}"
    buffer = max_length // 5 if buffer is None else buffer
    if not 0 <= buffer <= max_length or max_length < 1:
        raise ValueError(f"buffer={buffer} must lie in [0, max_length={max_length}]; a fifth of it is DAPO's choice.")
    penalty_B = (max_length - buffer - length_B).double() / max(buffer, 1)
    return torch.where(length_B > max_length, -1.0, penalty_B.clamp(-1.0, 0.0)).float()


def running_scale(state: Moments, reward_B: Tensor) -> tuple[Moments, float]:
    """Update the running moments of all rewards with a batch, and return the scale to divide rewards by.

    A running deviation keeps the reward's scale stable while the policy improves; a batch's own would amplify noise in
    batches of similar rewards. Engstrom et al. 2020, arXiv 2005.12729, section 2, applied to rewards instead of
    discounted sums because a response is one episode with one reward.

    Args:
        state: `Moments()` at the start; floats that the loop keeps and checkpoints.
        reward_B: [B] floating, of the global batch; NaN (no reward) is ignored.

    Returns:
        (new state, standard deviation of all rewards so far in the reward's unit, 1 while it is 0).
    """
    check_rows("reward_B", reward_B, len(reward_B))
    state_13 = torch.tensor([state], dtype=torch.float64, device=reward_B.device)
    merged = merge_moments(torch.cat([state_13, row_moments(reward_B, ~torch.isnan(reward_B))]))
    return merged, merged.std or 1.0
