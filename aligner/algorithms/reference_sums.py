"""The reference's log-probability of each response, computed once for each row of the data and kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.objective.masked import row_sums
from aligner.spmd.ref import Ref

if TYPE_CHECKING:
    from aligner.trainer.policy import Reference


class ReferenceSums:
    """Answers for rows of preference and feedback data, which come again in every epoch.

    Every rank keeps all sums, 8 bytes a row, and so all agree on whether the reference has to be asked.
    """

    def __init__(self, reference: Reference, kept: Any = None) -> None:
        """
        Args:
            kept: `roles.keep(reference_sums=[])`, so that a run that goes on has the sums that it had, to the last bit:
                asked again in another batch, the reference's would round differently.
        """
        self.reference = reference
        self._kept = SimpleNamespace(reference_sums=[]) if kept is None else kept
        self._known = {(number, side): value for number, side, value in self._kept.reference_sums}

    def __call__(self, batch: Samples, rows: Ref) -> Ref:
        """The sums of `batch`, which every rank holds and `rows` is, as a Ref to [B] float64 that lines up with it."""
        assert rows.rows is not None
        size = rows.rows.group_size  # the two sides of a pair have one number
        keys = [(number, place % size) for place, number in enumerate(batch.prompt_index_B.tolist())]
        if any(key not in self._known for key in keys):
            logp_BT = self.reference.logprobs(rows)
            sums_B: Tensor = self.reference.map(row_sums, logp_BT, rows["mask_BT"]).gather()
            found = [(*key, value) for key, value in zip(keys, sums_B.tolist(), strict=True)]
            self._kept.reference_sums += found
            self._known |= {(number, side): value for number, side, value in found}
        return self.reference.scatter_like(rows, torch.tensor([self._known[key] for key in keys], dtype=torch.float64))
