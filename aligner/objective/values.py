"""The critic's side of PPO: advantages from values (GAE), and the loss that teaches the values."""

import torch
from torch import Tensor

from aligner.objective.masked import check_rows, check_tokens, inside
from aligner.objective.token_rewards import check_discount


def gae(
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16.

        delta_t = r_t + gamma V_next - V_t
        A_t     = delta_t + gamma lam A_next
        R_t     = A_t + V_t                     what the critic learns

    A state is the text before a trained token, and the state after it is the one before the next trained token: what
    lies between takes no step. After the last trained token V is 0, the episode being over, or `bootstrap_B`.

    Args:
        reward_BT: [B, T] floating, see `kl_rewards`.
        value_BT: [B, T] float32 or float64, in the reward's unit: V of the state before token t.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere both may hold anything.
        gamma, lam: discounts a trained token.
        bootstrap_B: [B], V of the state after the row's last token, for rows that were cut off at a limit and would
            have gone on; 0 for a row that ended by itself.

    Returns:
        advantage_BT, return_BT: [B, T], dtype of value_BT, no gradient, 0 outside the mask.

    Raises:
        ValueError: a discount outside [0, 1].
    """
    check_tokens("value_BT", value_BT, mask_BT, reward_BT)
    check_rows("bootstrap_B", bootstrap_B, len(mask_BT))
    check_discount("gamma", gamma)
    check_discount("lam", lam)
    reward_TB = inside(mask_BT, reward_BT.detach().double()).T
    value_TB = inside(mask_BT, value_BT.detach().double()).T
    advantage_TB = torch.zeros_like(value_TB)
    next_advantage_B = value_TB.new_zeros(len(value_BT))
    next_value_B = next_advantage_B if bootstrap_B is None else bootstrap_B.detach().to(next_advantage_B)
    for t in reversed(range(len(value_TB))):
        delta_B = reward_TB[t] + gamma * next_value_B - value_TB[t]
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], value_TB[t], next_value_B)
        advantage_TB[t] = next_advantage_B
    advantage_BT = inside(mask_BT, advantage_TB.T)
    return advantage_BT.to(value_BT.dtype), (advantage_BT + value_TB.T).to(value_BT.dtype)


def clipped_value_loss(
    value_BT: Tensor, *, mask_BT: Tensor, rollout_value_BT: Tensor, return_BT: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss, per token and not reduced.

        loss = 1/2 max((V - R)^2, (clip(V, V_rollout - clip, V_rollout + clip) - R)^2)

    Schulman et al. 2017, arXiv 1707.06347, equation 9, with the clip of its reference implementation (Engstrom et al.
    2020, arXiv 2005.12729, section 2, item 1), which holds the values within a step as the policy's clip holds the
    policy. clip=inf is the plain squared error.

    Args:
        value_BT: [B, T] float32 or float64, in the reward's unit.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere any input may hold anything, NaN and inf included.
        rollout_value_BT: [B, T], the values that `gae` was given, before any update on this batch.
        return_BT: [B, T], what `gae` returned.
        clip: the largest change, in the reward's unit.

    Returns:
        loss_BT: [B, T], dtype of value_BT, 0 outside the mask; only value_BT gets gradients.
        metrics: [B, T] each, detached, 0 outside the mask. "value"; "return"; "error": |V - R|; "value_clip_fraction":
            1 where the clip binds, so that the loss has no gradient.

    Raises:
        ValueError: a clip that is not positive.
    """
    check_tokens("value_BT", value_BT, mask_BT, rollout_value_BT, return_BT)
    if not clip > 0.0:
        raise ValueError(f"clip={clip} must be more than 0; 0.2 is usual, inf clips nothing.")
    inside_BT = inside(mask_BT, value_BT)
    rollout_BT = inside(mask_BT, rollout_value_BT.detach()).to(value_BT.dtype)
    target_BT = inside(mask_BT, return_BT.detach()).to(value_BT.dtype)
    clipped_BT = rollout_BT + (inside_BT - rollout_BT).clamp(-clip, clip)
    error_BT, clipped_error_BT = (inside_BT - target_BT).square(), (clipped_BT - target_BT).square()
    loss_BT = 0.5 * torch.maximum(error_BT, clipped_error_BT)
    binds_BT = (clipped_error_BT > error_BT) & ((inside_BT - rollout_BT).abs() > clip)
    metrics = {
        "value": inside_BT,
        "return": target_BT,
        "error": error_BT.sqrt(),
        "value_clip_fraction": binds_BT.to(value_BT.dtype),
    }
    return loss_BT, {name: metric_BT.detach() for name, metric_BT in metrics.items()}
