"""The loss of one minibatch, microbatch by microbatch: a `MicrobatchLoss` for the training engine, and what it reports."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.spmd import batch_ops
from aligner.trainer.config import TrainingConfig
from aligner.trainer.loss_mean import LossFunction, Totals, global_mean
from aligner.trainer.offending_batch import MicrobatchOutput
from aligner.trainer.update_metrics import add_to, gather_metrics


class MinibatchLoss:
    """A `MicrobatchLoss`: a loss function applied to this data shard's rows of a minibatch, averaged over the global batch.

    The loss's metrics are summed in `sums`, each microbatch's readout and loss are kept in `outputs`; both stay empty on ranks
    that do not compute the loss.
    """

    def __init__(
        self,
        loss: LossFunction,
        samples: Samples,
        fields: dict[str, Any],
        batches: Sequence[list[int]],
        totals: Totals,
        config: TrainingConfig,
        *,
        max_response: int,
        device: torch.device,
        version: int | None,
    ) -> None:
        """
        Args:
            fields: what the loss may take by name: tensors with as many rows as `samples`, or plain values.
            batches: row indices of each microbatch; empty ones contribute 0.
            totals: counts over the global batch.
            max_response: number of tokens that reduction=fixed divides by if config.fixed_length is 0.
            version: number of updates of the weights being trained, for the metric `staleness`; None: no such metric.
        """
        self.loss, self.samples, self.fields, self.batches = loss, samples, fields, batches
        self.totals, self.config, self.max_response = totals, config, max_response
        self.device, self.version = device, version
        self.loss_parameters = inspect.signature(loss).parameters
        self.sums: dict[str, Tensor] = {}
        self.outputs: list[MicrobatchOutput] = []

    def __call__(self, number: int, readouts: dict[str, Tensor]) -> Tensor:
        """(index of the microbatch, its readouts) -> its contribution to the mean over the global batch."""
        (_, result), *further_readouts = readouts.items()
        rows, samples = self.batches[number], self.samples
        if not rows:
            return 0.0 * result.sum()
        arguments = {name: rows_of(value, rows, samples.rows) for name, value in self.fields.items()}
        arguments |= {
            "mask_BT": samples.mask_BT[rows],
            "rollout_logp_BT": batch_ops.take(samples.rollout_logp_BT, rows),
        }
        arguments = {name: self._fit(value, samples.length_B[rows]) for name, value in arguments.items()}
        arguments |= dict(further_readouts)
        unreduced, metrics = self.loss(
            result, **{name: value for name, value in arguments.items() if name in self.loss_parameters}
        )
        self.outputs.append(MicrobatchOutput(rows, result.detach(), unreduced.detach()))
        if self.version is not None and samples.version_BT is not None:
            metrics["staleness"] = self._fit(self.version - samples.version_BT[rows], samples.length_B[rows])
        readout_metrics = {name.removesuffix("_BT"): value_BT for name, value_BT in further_readouts}
        mask_BT = batch_ops.fit_width(samples.mask_BT[rows], int(samples.length_B[rows].max()))
        gather_metrics(self.sums, {**readout_metrics, **metrics}, mask_BT)
        contribution = global_mean(unreduced, arguments["mask_BT"], self.totals, self.config, self.max_response)
        add_to(self.sums, "sum/loss", contribution)
        return contribution

    def _fit(self, value: Any, length_B: Tensor) -> Any:
        """Move a tensor to the model's device, cut to the microbatch's longest row; other values are returned as they are."""
        if not isinstance(value, Tensor):
            return value
        return batch_ops.fit_width(value.to(self.device, non_blocking=True), int(length_B.max()))


def rows_of(value: Any, rows: list[int], total: int) -> Any:
    """`rows` of a tensor that has `total` rows; any other value (a number, None) is returned as it is."""
    return batch_ops.take(value, rows) if isinstance(value, Tensor) and value.dim() and len(value) == total else value
