"""A training step of transformers and torch alone: rows padded within microbatches of like lengths, fused AdamW, gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GROUPS_A_MICROBATCH = 8
"""Where lengths differ; rows of one length make one microbatch."""
Row = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""


def join(port: int, rank: int, ranks: int) -> Any:
    """The process group of the bench's processes, which is no default group: vLLM makes that of each process."""
    limit = timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timeout=limit)
    return dist.ProcessGroupGloo(store, rank, ranks, limit)


class BareTraining:
    """A model and its AdamW, float32 or under bfloat16's autocast; gradients are summed over the group's processes."""

    def __init__(self, model: Any, group: Any, ranks: int, lr: float, autocast: bool) -> None:
        self.model, self.group, self.ranks, self.autocast = model, group, ranks, autocast
        self.weights = list(model.parameters())
        # One storage for all gradients, so that one call sums them.
        self.gradient = torch.zeros(sum(weight.numel() for weight in self.weights))
        start = 0
        for weight in self.weights:
            weight.grad = self.gradient[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update(self, groups: Sequence[Sequence[Row]], loss: Callable[[Batch], Tensor]) -> None:
        """One optimizer step on all groups of rows; a group stays in one microbatch.

        Args:
            loss: of a microbatch, a sum that is divided by the number of groups.
        """
        self.gradient.zero_()
        for microbatch in microbatches(groups):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                value = loss(Batch([row for group in microbatch for row in group]))
            (value / len(groups)).backward()
        if self.ranks > 1:
            self.group.allreduce([self.gradient]).wait()
            self.gradient /= self.ranks
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()


def microbatches(groups: Sequence[Sequence[Row]]) -> list[Sequence[Sequence[Row]]]:
    """All groups at once if all rows are equally long; else in the order of their lengths, some at a time."""
    if len({len(row) for group in groups for row, _ in group}) == 1:
        return [groups]
    ordered = sorted(groups, key=lambda group: max(len(row) for row, _ in group))
    return [ordered[first : first + GROUPS_A_MICROBATCH] for first in range(0, len(ordered), GROUPS_A_MICROBATCH)]


class Batch:
    """Rows padded on the right."""

    def __init__(self, rows: Sequence[Row]) -> None:
        length_B = torch.tensor([len(row) for row, _ in rows])
        longest = int(length_B.max())
        self.first = min(prompt for _, prompt in rows)
        """The first place that any row trains."""
        self.ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, (row, _) in enumerate(rows):
            self.ids_BT[place, : len(row)] = torch.tensor(row)
        place_T = torch.arange(longest)
        there_BT = place_T < length_B[:, None]
        self.attended_BT = None if bool(there_BT.all()) else there_BT
        self.mask_BT = (there_BT & (place_T >= torch.tensor([prompt for _, prompt in rows])[:, None]))[:, self.first :]
        """Trained tokens, from `first` on."""

    def logp(self, model: Any) -> Tensor:
        """log p of each token from `first` on; the output layer is computed for these alone."""
        keep = self.ids_BT.shape[1] - self.first + 1
        logits_BTV = model(self.ids_BT, attention_mask=self.attended_BT, logits_to_keep=keep, use_cache=False).logits[
            :, :-1
        ]
        token_BT = self.ids_BT[:, self.first :]
        return -torch.nn.functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), token_BT.flatten(), reduction="none"
        ).view_as(token_BT)  # fmt: skip
