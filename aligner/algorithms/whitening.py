"""Whiten advantages over the global batch; the result does not depend on how rows are distributed over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from aligner.objective.moments import mean_and_std, row_moments, whiten
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role


def whiten_batch(role: Role, advantage_BT: Ref, samples: Ref) -> Ref:
    """(A - mean) / std over all trained tokens of the global batch, 0 elsewhere. Collective over the world.

    Args:
        advantage_BT: Ref to [B, T]. samples: Ref to the `Samples` that it belongs to.
    """
    moments = role.map(_moments, advantage_BT, samples["mask_BT"]).gather()
    mean, std = mean_and_std(torch.stack(list(moments.values()), dim=1))
    return role.map(whiten, advantage_BT, samples["mask_BT"], mean=mean, std=std)


def _moments(advantage_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Row moments as one [B] tensor each, because `gather` takes a 2-D tensor for [B, T]."""
    return dict(zip(("n", "mean", "m2"), row_moments(advantage_BT, mask_BT).unbind(1), strict=True))
