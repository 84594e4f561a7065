"""Building blocks of the policy losses: advantages on tokens, the clipped objective, KL and entropy terms."""

import torch
from torch import Tensor

from aligner.objective.kl import Estimator, kl_estimate
from aligner.objective.masked import apply_mask, check_rows


def advantage_on_tokens(mask_BT: Tensor, advantage_B: Tensor | None, advantage_BT: Tensor | None) -> Tensor:
    """[B, T] advantages from whichever of the two is given, 0 outside the mask; ValueError unless exactly one is."""
    if advantage_BT is not None and advantage_B is None:
        assert advantage_BT.shape == mask_BT.shape, f"advantage_BT is {tuple(advantage_BT.shape)}"
        return apply_mask(mask_BT, advantage_BT.detach())
    if advantage_B is not None and advantage_BT is None:
        check_rows("advantage_B", advantage_B, len(mask_BT))
        return apply_mask(mask_BT, advantage_B.detach()[:, None])
    raise ValueError("pass exactly one of advantage_B (one per row) and advantage_BT (one per token).")


def kl_and_entropy_terms(
    logp_BT: Tensor,
    mask_BT: Tensor,
    reference_logp_BT: Tensor | None,
    kl_coef: float,
    kl: Estimator,
    entropy_BT: Tensor | None,
    entropy_coef: float,
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """(kl_coef KL - entropy_coef H, {"kl", "entropy"}); metrics are returned if their inputs are given, whatever the
    coefficients."""
    _check_terms(kl_coef, kl, reference_logp_BT, entropy_coef, entropy_BT)
    extra_BT: Tensor | float = 0.0
    metrics = {}
    if reference_logp_BT is not None:
        metrics["kl"] = kl_estimate(logp_BT, apply_mask(mask_BT, reference_logp_BT.detach()), kl)
        if kl_coef != 0.0:
            extra_BT = extra_BT + kl_coef * metrics["kl"]
    if entropy_BT is not None:
        metrics["entropy"] = apply_mask(mask_BT, entropy_BT)
        if entropy_coef != 0.0:
            extra_BT = extra_BT - entropy_coef * metrics["entropy"]
    return extra_BT, metrics


def clipped_objective(
    ratio_BT: Tensor, advantage_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """min(r A, clip(r) A); with dual_clip not below dual_clip A where A < 0."""
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    if dual_clip is None:
        return objective_BT
    return torch.where(advantage_BT < 0, torch.maximum(objective_BT, dual_clip * advantage_BT), objective_BT)


def clip_is_active(
    ratio_BT: Tensor, advantage_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """bool [B, T]: where a clip is active, so that the objective is constant in the ratio."""
    active_BT = ((advantage_BT > 0) & (ratio_BT > 1.0 + clip_high)) | ((advantage_BT < 0) & (ratio_BT < 1.0 - clip_low))
    if dual_clip is not None:
        active_BT = active_BT | ((advantage_BT < 0) & (ratio_BT > dual_clip))
    return active_BT


def check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raises ValueError for a clip range or dual_clip out of bounds."""
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low={clip_low} must lie in [0, 1]; 0.2 is usual, 1 clips nothing.")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high={clip_high} must be 0 or more; 0.2 is usual, 0.28 is DAPO's, inf clips nothing.")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip={dual_clip} must be more than 1; 3 is usual, null turns it off.")


def _check_terms(
    kl_coef: float, kl: Estimator, reference_logp_BT: Tensor | None, entropy_coef: float, entropy_BT: Tensor | None
) -> None:
    if kl_coef != 0.0 and reference_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logp_BT; pass it, or set kl_coef=0.")
    if kl_coef != 0.0 and kl == "k1":
        raise ValueError(
            f"kl=k1 with kl_coef={kl_coef} regularises nothing, because the expected gradient of k1 is 0; use k2 or k3."
        )
    if entropy_coef != 0.0 and entropy_BT is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy_BT; pass it, or set entropy_coef=0.")
