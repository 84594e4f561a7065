"""Rows 2i and 2i + 1 of a batch are a pair: which of them is the chosen one, and back to one number a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from aligner.objective.masked import check_rows, difference

Function = TypeVar("Function", bound=Callable[..., Any])


def of_pairs(loss: Function) -> Function:
    """Marks a loss whose rows belong together two by two, so that no pair is split over microbatches, and none of a pair
    that is left out counts in the mean."""
    loss.rows_together = 2  # type: ignore[attr-defined]
    loss.counted_rows = counted_rows  # type: ignore[attr-defined]
    return loss


def counted_rows(mask_BT: Tensor, preference_B: Tensor | None = None) -> Tensor:
    """bool [B]: the rows of pairs that are compared: one row may be trained, its partner not; arguments as in `pairs_of`."""
    return pairs_of(len(mask_BT), mask_BT, preference_B, mask_BT.device).kept_B


@dataclass(frozen=True)
class Pairs:
    """The pairs of some rows."""

    swapped_P: Tensor
    """bool [P]: the second row is the chosen one."""
    kept_P: Tensor
    """bool [P]: not left out."""

    @property
    def kept_B(self) -> Tensor:
        """bool [B]: rows of pairs that are not left out."""
        return self.kept_P.repeat_interleave(2)

    def split(self, value_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> the chosen ones' and the rejected ones', [P] each, 0 for a pair that is left out."""
        value_P2 = torch.where(self.kept_P[:, None], value_B.reshape(-1, 2), 0.0)
        first_P, second_P = value_P2.unbind(dim=1)
        return torch.where(self.swapped_P, second_P, first_P), torch.where(self.swapped_P, first_P, second_P)

    def join(self, value_P: Tensor, dtype: torch.dtype) -> Tensor:
        """[P] -> [B]: both rows hold the pair's number, 0 if it is left out."""
        return torch.where(self.kept_P, value_P, 0.0).repeat_interleave(2).to(dtype)

    def metrics(self, chosen_P: Tensor, rejected_P: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What every comparison of two rewards reports: the rewards, their difference, how often it is positive."""
        found = {
            "chosen_reward": chosen_P,
            "rejected_reward": rejected_P,
            "margin": difference(chosen_P, rejected_P),
            "pair_accuracy": (chosen_P > rejected_P).double(),
        }
        return {name: self.join(value_P.detach(), dtype) for name, value_P in found.items()}


def pairs_of(rows: int, mask_BT: Tensor | None, preference_B: Tensor | None, device: torch.device) -> Pairs:
    """The pairs of `rows` rows.

    Args:
        mask_BT: [B, T] bool, the trained tokens: a pair is left out when one of its rows has none.
        preference_B: [B] floating: 1 for the chosen row, -1 for the rejected one, 0 for both to leave the pair out;
            None: the first row of each pair is the chosen one.

    Raises:
        ValueError: the preferences of a pair are not 1 and -1, -1 and 1, or 0 and 0.
    """
    assert rows % 2 == 0, f"{rows} rows are not whole pairs"
    kept_P = torch.ones(rows // 2, dtype=torch.bool, device=device)
    swapped_P = ~kept_P
    if preference_B is not None:
        check_rows("preference_B", preference_B, rows)
        first_P, second_P = preference_B.reshape(-1, 2).unbind(dim=1)
        known_P = (first_P == -second_P) & ((first_P.abs() == 1) | (first_P == 0))
        if not bool(known_P.all()):
            wrong = preference_B.reshape(-1, 2)[~known_P][0].tolist()
            raise ValueError(f"a pair's preferences are {wrong}; use 1 and -1, -1 and 1, or 0 and 0 to leave it out.")
        kept_P, swapped_P = first_P != 0, first_P < 0
    if mask_BT is not None:
        kept_P = kept_P & mask_BT.any(dim=1).reshape(-1, 2).all(dim=1)
    return Pairs(swapped_P, kept_P)
