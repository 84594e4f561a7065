"""The critic's part of PPO: generalised advantage estimation (GAE) and the clipped value loss."""

import torch
from torch import Tensor

from aligner.objective.masked import apply_mask, check_rows, check_tokens
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
        R_t     = A_t + V_t                     the critic's regression target

    Time steps are the trained tokens: the state of token t is the text before it, and "next" is the row's next trained
    token; untrained tokens in between are no time steps. After the last one V is 0 (the episode ends), or `bootstrap_B`.

    Args:
        reward_BT: [B, T] floating, see `kl_rewards`.
        value_BT: [B, T] float32 or float64, in the reward's unit: V of the state before token t.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask both may hold any value.
        gamma, lam: discount factors per trained token.
        bootstrap_B: [B], V of the state after the row's last token for truncated rows; 0 for terminated rows.

    Returns:
        advantage_BT, return_BT: [B, T], dtype of value_BT, no gradient, 0 outside the mask.

    Raises:
        ValueError: gamma or lam outside [0, 1].
    """
    check_tokens("value_BT", value_BT, mask_BT, reward_BT)
    check_rows("bootstrap_B", bootstrap_B, len(mask_BT))
    check_discount("gamma", gamma)
    check_discount("lam", lam)
    reward_TB = apply_mask(mask_BT, reward_BT.detach().double()).T
    value_TB = apply_mask(mask_BT, value_BT.detach().double()).T
    advantage_TB = torch.zeros_like(value_TB)
    next_advantage_B = value_TB.new_zeros(len(value_BT))
    next_value_B = next_advantage_B if bootstrap_B is None else bootstrap_B.detach().to(next_advantage_B)
    for t in reversed(range(len(value_TB))):
        delta_B = reward_TB[t] + gamma * next_value_B - value_TB[t]
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], value_TB[t], next_value_B)
        advantage_TB[t] = next_advantage_B
    advantage_BT = apply_mask(mask_BT, advantage_TB.T)
    return advantage_BT.to(value_BT.dtype), (advantage_BT + value_TB.T).to(value_BT.dtype)


def clipped_value_loss(
    value_BT: Tensor, *, mask_BT: Tensor, rollout_value_BT: Tensor, return_BT: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's clipped squared error, per token, not reduced.

        loss = 1/2 max((V - R)^2, (clip(V, V_rollout - clip, V_rollout + clip) - R)^2)

    Schulman et al. 2017, arXiv 1707.06347, equation 9, with the clip of its reference implementation (Engstrom et al.
    2020, arXiv 2005.12729, section 2, item 1), which bounds the change of the values as the policy's clip bounds that of
    the policy. clip=inf is the ordinary squared error.

    Args:
        value_BT: [B, T] float32 or float64, in the reward's unit.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask inputs may hold any value, including NaN and inf.
        rollout_value_BT: [B, T], the values passed to `gae`, before any update on this batch.
        return_BT: [B, T], the returns from `gae`.
        clip: largest change of a value, in the reward's unit.

    Returns:
        loss_BT: [B, T], dtype of value_BT, 0 outside the mask; only value_BT gets gradients.
        metrics: [B, T] each, detached, 0 outside the mask. "value"; "return"; "error": |V - R|; "value_clip_fraction":
            1 where the clip is active and the loss has no gradient.

    Raises:
        ValueError: clip is not positive.
    """
    check_tokens("value_BT", value_BT, mask_BT, rollout_value_BT, return_BT)
    if not clip > 0.0:
        raise ValueError(f"clip={clip} must be more than 0; 0.2 is usual, inf turns clipping off.")
    value_masked_BT = apply_mask(mask_BT, value_BT)
    rollout_BT = apply_mask(mask_BT, rollout_value_BT.detach()).to(value_BT.dtype)
    target_BT = apply_mask(mask_BT, return_BT.detach()).to(value_BT.dtype)
    clipped_BT = rollout_BT + (value_masked_BT - rollout_BT).clamp(-clip, clip)
    error_BT, clipped_error_BT = (value_masked_BT - target_BT).square(), (clipped_BT - target_BT).square()
    loss_BT = 0.5 * torch.maximum(error_BT, clipped_error_BT)
    clip_active_BT = (clipped_error_BT > error_BT) & ((value_masked_BT - rollout_BT).abs() > clip)
    metrics = {
        "value": value_masked_BT,
        "return": target_BT,
        "error": error_BT.sqrt(),
        "value_clip_fraction": clip_active_BT.to(value_BT.dtype),
    }
    return loss_BT, {name: metric_BT.detach() for name, metric_BT in metrics.items()}
