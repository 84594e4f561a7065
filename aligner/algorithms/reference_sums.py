"""Cached log-probability of each response under the reference, computed once per data row (offline preference losses)."""

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
    """log p_reference(response) for rows of preference and feedback data, which recur in every epoch.

    Every rank caches the sums of all rows (8 bytes each), so all ranks agree on whether a reference forward is needed.
    """

    def __init__(self, reference: Reference, state: Any = None) -> None:
        """
        Args:
            state: `roles.keep(reference_sums=[])`, which checkpoints save, so that a resumed run has the same sums bit for
                bit: recomputed in another batch they would round differently. None: not checkpointed.
        """
        self.reference = reference
        self._state = SimpleNamespace(reference_sums=[]) if state is None else state
        self._cache = {(number, side): value for number, side, value in self._state.reference_sums}

    def __call__(self, batch: Samples, rows: Ref) -> Ref:
        """The sums of one batch. Collective over the world.

        Args:
            batch: the rows, on every rank.
            rows: the same rows, scattered over the reference's data-parallel ranks.

        Returns:
            Ref to [B] float64, aligned with `rows`.
        """
        assert rows.rows is not None
        group_size = rows.rows.group_size  # both rows of a pair have the same prompt_index
        keys = [(number, row % group_size) for row, number in enumerate(batch.prompt_index_B.tolist())]
        if any(key not in self._cache for key in keys):
            logp_BT = self.reference.logprobs(rows)
            sums_B: Tensor = self.reference.map(row_sums, logp_BT, rows["mask_BT"]).gather()
            new = [(*key, value) for key, value in zip(keys, sums_B.tolist(), strict=True)]
            self._state.reference_sums += new
            self._cache |= {(number, row_in_pair): value for number, row_in_pair, value in new}
        return self.reference.scatter_like(rows, torch.tensor([self._cache[key] for key in keys], dtype=torch.float64))
