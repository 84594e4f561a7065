"""Preference pairs, rows 2i and 2i + 1 of a batch: split rows into chosen and rejected, and back to one value per row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from aligner.objective.masked import check_rows, difference

Function = TypeVar("Function", bound=Callable[..., Any])


def pairwise_loss(loss: Function) -> Function:
    """Decorator of a pairwise loss: the trainer keeps pairs in one microbatch, and masked-out pairs do not count in the
    mean."""
    loss.rows_together = 2  # type: ignore[attr-defined]
    loss.counted_rows = counted_rows  # type: ignore[attr-defined]
    return loss


def counted_rows(mask_BT: Tensor, preference_B: Tensor | None = None) -> Tensor:
    """bool [B]: rows of pairs that are compared, i.e. both rows have trained tokens; arguments as in `pair_rows`."""
    return pair_rows(len(mask_BT), mask_BT, preference_B, mask_BT.device).counted_B


@dataclass(frozen=True)
class PairRows:
    """Which row of each pair is chosen, and which pairs count."""

    swapped_P: Tensor
    """bool [P]: the second row is the chosen one."""
    counted_P: Tensor
    """bool [P]: the pair counts (is not masked out)."""

    @property
    def counted_B(self) -> Tensor:
        """bool [B]: rows of pairs that count."""
        return self.counted_P.repeat_interleave(2)

    def split(self, value_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> (chosen_P, rejected_P), 0 for a pair that is masked out."""
        value_P2 = torch.where(self.counted_P[:, None], value_B.reshape(-1, 2), 0.0)
        first_P, second_P = value_P2.unbind(dim=1)
        return torch.where(self.swapped_P, second_P, first_P), torch.where(self.swapped_P, first_P, second_P)

    def join(self, value_P: Tensor, dtype: torch.dtype) -> Tensor:
        """[P] -> [B]: both rows hold the pair's value, 0 if the pair is masked out."""
        return torch.where(self.counted_P, value_P, 0.0).repeat_interleave(2).to(dtype)

    def metrics(self, chosen_P: Tensor, rejected_P: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """[B] metrics of all pairwise losses: chosen and rejected reward, margin, and accuracy (chosen > rejected)."""
        pair_metrics = {
            "chosen_reward": chosen_P,
            "rejected_reward": rejected_P,
            "margin": difference(chosen_P, rejected_P),
            "pair_accuracy": (chosen_P > rejected_P).double(),
        }
        return {name: self.join(value_P.detach(), dtype) for name, value_P in pair_metrics.items()}


def pair_rows(rows: int, mask_BT: Tensor | None, preference_B: Tensor | None, device: torch.device) -> PairRows:
    """The pairs of a batch of `rows` rows.

    Args:
        mask_BT: [B, T] bool, the trained tokens: a pair is masked out if one of its rows has none.
        preference_B: [B] floating: 1 for the chosen row, -1 for the rejected one, 0 for both to mask the pair out;
            None: the first row of each pair is the chosen one.

    Raises:
        ValueError: the preferences of a pair are not 1 and -1, -1 and 1, or 0 and 0.
    """
    assert rows % 2 == 0, f"{rows} rows are not complete pairs"
    counted_P = torch.ones(rows // 2, dtype=torch.bool, device=device)
    swapped_P = ~counted_P
    if preference_B is not None:
        check_rows("preference_B", preference_B, rows)
        first_P, second_P = preference_B.reshape(-1, 2).unbind(dim=1)
        valid_P = (first_P == -second_P) & ((first_P.abs() == 1) | (first_P == 0))
        if not bool(valid_P.all()):
            wrong = preference_B.reshape(-1, 2)[~valid_P][0].tolist()
            raise ValueError(f"a pair's preferences are {wrong}; use 1 and -1, -1 and 1, or 0 and 0 to mask it out.")
        counted_P, swapped_P = first_P != 0, first_P < 0
    if mask_BT is not None:
        counted_P = counted_P & mask_BT.any(dim=1).reshape(-1, 2).all(dim=1)
    return PairRows(swapped_P, counted_P)
