"""What is done to a reward, a row at a time, before any advantage is taken of it: length, scale."""

import torch
from torch import Tensor

from aligner.objective.masked import check_rows
from aligner.objective.moments import Moments, merge, row_moments


def overlong_penalty(length_B: Tensor, *, max_length: int, buffer: int | None = None) -> Tensor:
    """Soft overlong punishment, to be added to the reward: Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13.

         0                                      length <= max_length - buffer
        (max_length - buffer - length) / buffer     in the buffer
        -1                                      length >  max_length

    Args:
        length_B: [B] integers, tokens of the response.
        max_length: L_max, tokens. buffer: L_cache, tokens at the end of it over which the penalty grows; 0 for a step;
            None for the paper's fifth of max_length.

    Returns:
        penalty_B: [B] float32, from -1 to 0.

    Raises:
        ValueError: a buffer that does not fit.
    """
    assert length_B.ndim == 1 and not length_B.is_floating_point(), f"{tuple(length_B.shape)}, {length_B.dtype}"
    buffer = max_length // 5 if buffer is None else buffer
    if not 0 <= buffer <= max_length or max_length < 1:
        raise ValueError(f"buffer={buffer} must lie in [0, max_length={max_length}]; a fifth of it is DAPO's choice.")
    penalty_B = (max_length - buffer - length_B).double() / max(buffer, 1)
    return torch.where(length_B > max_length, -1.0, penalty_B.clamp(-1.0, 0.0)).float()


def running_scale(state: Moments, reward_B: Tensor) -> tuple[Moments, float]:
    """Take a batch of rewards into the running moments of all rewards so far, and say what to divide rewards by.

    Scaling by a running deviation holds the reward's unit steady while the policy improves, where a batch's own would
    blow up the noise of a batch of like rewards: Engstrom et al. 2020, arXiv 2005.12729, section 2, of the rewards
    instead of their discounted sums, a response being one episode with one reward.

    Args:
        state: `Moments()` at the start; plain floats, for the loop to keep and to write into its checkpoints.
        reward_B: [B] floating, of every shard; a NaN (no reward) is left out.

    Returns:
        The new state, and the deviation of every reward so far, in the reward's unit; 1 while there is none.
    """
    check_rows("reward_B", reward_B, len(reward_B))
    before_13 = torch.tensor([state], dtype=torch.float64, device=reward_B.device)
    after = merge(torch.cat([before_13, row_moments(reward_B, ~torch.isnan(reward_B))]))
    return after, after.std or 1.0
