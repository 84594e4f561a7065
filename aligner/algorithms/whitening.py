"""Advantages in standard deviations of the whole batch, the same however it lies on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from aligner.objective.moments import combine, row_moments, whiten
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role


def whitened(role: Role, advantage_BT: Ref, samples: Ref) -> Ref:
    """(A - mean) / std over every trained token of every row; 0 elsewhere. A call of all ranks."""
    found = role.map(_moments, advantage_BT, samples["mask_BT"]).gather()
    mean, std = combine(torch.stack(list(found.values()), dim=1))
    return role.map(whiten, advantage_BT, samples["mask_BT"], mean=mean, std=std)


def _moments(advantage_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """One [B] for each moment: what has two dimensions is taken for [B, T] on its way."""
    return dict(zip(("n", "mean", "m2"), row_moments(advantage_BT, mask_BT).unbind(1), strict=True))
