"""One optimizer step, as far as it is the same for every model and engine: the loss of each microbatch, and sums over ranks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.data.samples import Samples
from aligner.spmd import batch_ops
from aligner.spmd.messages import all_gather
from aligner.spmd.world import World
from aligner.trainer.config import TrainingConfig
from aligner.trainer.engine import TrainEngine
from aligner.trainer.loss_mean import LossFunction, Totals, global_mean
from aligner.trainer.offending_batch import MicrobatchOutput
from aligner.trainer.update_metrics import add_to, gather_metrics


class MinibatchLoss:
    """A `MicrobatchLoss`: a loss function over this shard's rows of one minibatch, as its mean over the global batch.

    What the loss reports is summed up in `sums`, what each microbatch gave is in `outputs`; both stay empty on ranks that do
    not compute the loss.
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
            fields: what the loss may ask for by name; tensors of as many rows as `samples`, or plain values.
            batches: rows of each microbatch; empty ones add 0.
            totals: counts over the global batch.
            max_response: tokens that reduction=fixed divides by where config.fixed_length is 0.
            version: of the weights that are being trained, for the metric `staleness`; None: no such metric.
        """
        self.loss, self.samples, self.fields, self.batches = loss, samples, fields, batches
        self.totals, self.config, self.max_response = totals, config, max_response
        self.device, self.version = device, version
        self.wanted = inspect.signature(loss).parameters
        self.sums: dict[str, Tensor] = {}
        self.outputs: list[MicrobatchOutput] = []

    def __call__(self, number: int, readouts: dict[str, Tensor]) -> Tensor:
        """(number of the microbatch, its readouts) -> its part of the mean over the global batch."""
        (_, result), *further = readouts.items()
        rows, samples = self.batches[number], self.samples
        if not rows:
            return 0.0 * result.sum()
        given = {name: rows_of(value, rows, samples.rows) for name, value in self.fields.items()}
        given |= {"mask_BT": samples.mask_BT[rows], "rollout_logp_BT": batch_ops.take(samples.rollout_logp_BT, rows)}
        given = {name: self._fit(value, samples.length_B[rows]) for name, value in given.items()}
        given |= dict(further)
        unreduced, metrics = self.loss(result, **{name: given[name] for name in given if name in self.wanted})
        self.outputs.append(MicrobatchOutput(rows, result.detach(), unreduced.detach()))
        if self.version is not None and samples.version_BT is not None:
            metrics["staleness"] = self._fit(self.version - samples.version_BT[rows], samples.length_B[rows])
        reported = {name.removesuffix("_BT"): value_BT for name, value_BT in further}
        gather_metrics(self.sums, {**reported, **metrics}, given["mask_BT"])
        part = global_mean(unreduced, given["mask_BT"], self.totals, self.config, self.max_response)
        add_to(self.sums, "sum/loss", part)
        return part

    def _fit(self, value: Any, length_B: Tensor) -> Any:
        """On the model's device and as wide as the microbatch's longest row; what is no tensor stays as it is."""
        if not isinstance(value, Tensor):
            return value
        return batch_ops.fit_width(value.to(self.device, non_blocking=True), int(length_B.max()))


def rows_of(value: Any, rows: list[int], total: int) -> Any:
    """The rows of a row-wise value; anything else (a number, None) as it is."""
    return batch_ops.take(value, rows) if isinstance(value, Tensor) and value.dim() and len(value) == total else value


def reduce_sums(engine: TrainEngine, world: World, ranks: Sequence[int], sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums and maxima (`max/...`) over the data shards, equal on every rank of the role; in float64 on the host.

    Collective over `ranks`, the role's. A name that some ranks lack counts as 0 there, or as minus infinity of a maximum.
    """
    names = sorted({name for held in all_gather(world, sorted(sums), ranks) for name in held})
    minus_infinity = torch.tensor(-math.inf, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    added = [name for name in names if not name.startswith("max/")]
    topped = [name for name in names if name.startswith("max/")]
    total = torch.stack([sums.get(name, zero) for name in added] or [zero])
    top = torch.stack([sums.get(name, minus_infinity) for name in topped] or [zero])
    engine.all_reduce_data(total)
    engine.all_reduce_data(top, dist.ReduceOp.MAX)
    engine.broadcast_output(total)
    engine.broadcast_output(top)
    return dict(zip(topped, top.tolist(), strict=False)) | dict(zip(added, total.tolist(), strict=False))
