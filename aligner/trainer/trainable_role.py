"""`TrainableRole`: a `ModelRole` with an optimizer. `update(loss, samples)` takes epochs x minibatches optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.stored import describe_training
from aligner.spmd import batch_ops
from aligner.spmd.messages import broadcast
from aligner.spmd.partition import idle, minibatch_groups
from aligner.spmd.ref import Ref
from aligner.spmd.residency import Kind
from aligner.spmd.rows import BatchRows
from aligner.trainer import optimizer_checkpoint
from aligner.trainer.loss_mean import LossFunction, Totals, counted, rows_together, takes_one_step
from aligner.trainer.minibatch_loss import MinibatchLoss, rows_of
from aligner.trainer.model_role import ModelRole
from aligner.trainer.not_finite import EMPTY, SKIPPED, NotFinite, SkipCounter
from aligner.trainer.offending_batch import MicrobatchOutput, begin_offending, save_offending
from aligner.trainer.schedule import learning_rate
from aligner.trainer.update_metrics import StepReport, add_work, gather_advantages, over_steps, reduce_sums


class TrainableRole(ModelRole):
    """A `ModelRole` with an optimizer. `update(loss, samples)` takes `epochs` x `minibatches` optimizer steps."""

    section = "policy"
    """Its section of the configuration."""
    samples_itself = False
    """Whether the rollout samples with its weights: `version_BT` of samples then counts its updates."""
    needs: ClassVar[Mapping[str, Sequence[str]]] = {
        **ModelRole.needs,
        "update": ("weights", "gradients", "optimizer"),
        "save_state": ("weights", "optimizer"),
        "load_state": ("weights", "optimizer"),
    }
    reads = ModelRole.reads | {"save_state"}
    frozen = False
    kinds: ClassVar[Mapping[str, Kind]] = {**ModelRole.kinds, "gradients": Kind(), "optimizer": Kind(copied=True)}

    def __init__(
        self,
        *args: Any,
        total_steps: int = 0,
        max_response: int = 0,
        not_finite: NotFinite | None = None,
        skip_empty: bool = True,
        offending: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            skip_empty: skip the optimizer step on a minibatch without trained tokens, which would still move weights by momentum.
            offending: folder for the batch that stops the job; None: it is not saved.
        """
        super().__init__(*args, **kwargs)
        self.optimizer_steps, self.total_steps, self.max_response = 0, total_steps, max_response
        self.skips, self.skip_empty, self.offending = SkipCounter(not_finite or NotFinite()), skip_empty, offending
        self.has_optimizer = False
        self.version = 0
        """Number of `update` calls so far; the same on every rank of the world."""

    def make_optimizer(self) -> None:
        """Allocate gradient buffers and optimizer state, unless they exist; collective over the role's ranks."""
        if self.has_optimizer:
            return
        self.has_optimizer = True
        self.engine.make_optimizer()
        if self.config.dtype != "float32":
            optimizer_checkpoint.read_masters(self.spec, self.engine)

    @cached_property
    def description(self) -> dict[str, bytes]:
        """Configuration and tokenizer files, by name, that make a training checkpoint's folder a loadable model."""
        return describe_training(self.spec, self.name)

    def update(self, loss: LossFunction, samples: Ref, **fields: Any) -> Ref:
        """`epochs` x `minibatches` optimizer steps on one batch. A role call: every rank of the world makes it.

        Args:
            loss: `loss(<readout>, mask_BT=..., <fields by name>) -> (loss, metrics)`, unreduced: [B, T] per token, averaged by
                `reduction`, or [B] per row, averaged over the rows with a trained token. It may also take rollout_logp_BT
                and the further readouts (a policy's entropy_BT) by name. Attributes of the function: `rows_together` = n: n
                consecutive rows are compared and never split over microbatches; `counted_rows`: which rows count in the mean
                (see `counted`); `one_step` = True: the loss is valid only for samples of the current weights.
            fields: row-wise Refs (or plain values) passed to the loss by name.

        Returns:
            Ref to {metric: float}: the loss; its metrics, averaged over trained tokens or over the rows with one (and
            `<name>_max`); grad_norm, lr, tokens; skipped_steps and empty_steps if there were any; imbalance: fraction of time
            that data-parallel ranks wait for the one with the most expensive rows, by `cost`; padding: fraction of the
            computed tokens that are padding; shared_prefix: fraction of the rows' tokens that were computed for another row of
            the microbatch.

        Raises:
            ValueError: the batch's groups do not hold the rows that the loss compares; several steps with a `one_step` loss.
            ValueError: loss or gradients were not finite more often than `guards.not_finite` allows; on every rank of the role.
        """
        self.version += 1
        if takes_one_step(loss) and self.config.epochs * self.config.minibatches > 1:
            raise ValueError(
                f"{self.section}.epochs={self.config.epochs} and {self.section}.minibatches={self.config.minibatches}: the "
                "loss has no importance ratio, so it is valid for one optimizer step per batch only; set both to 1, or use "
                "clipped_surrogate."
            )
        with self.call("update"):
            local = self.localize((samples,), fields, self.config.minibatches)
            if not self.member:
                return Ref(self)
            assert local.rows is not None and local.rows.lengths is not None
            self._check_versions(loss, local.args[0])
            group_size = local.rows.group_size
            together = rows_together(loss)
            if group_size % together:
                raise ValueError(
                    f"{self.name}.update: the loss needs groups of {together} consecutive rows, and the batch has groups "
                    f"of {group_size}; make them with scatter(batch, group_size={together}) or num_samples={together}."
                )
            minibatches = minibatch_groups(len(local.rows.lengths) // group_size, self.config.minibatches)
            steps = []
            for _ in range(self.config.epochs):
                for groups in minibatches:
                    rows = [i for i, row in enumerate(local.row_numbers) if row // group_size in groups]
                    step_fields = {
                        name: rows_of(value, rows, len(local.row_numbers)) for name, value in local.kwargs.items()
                    }
                    steps.append(self._step(loss, together, batch_ops.take(local.args[0], rows), step_fields))
            return Ref(self, {**over_steps(steps), "imbalance": self._imbalance(local.rows)})

    def save_state(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """The role's state for a checkpoint. A role call.

        Returns:
            (counters, valid on rank 0 of the world; this rank's tensors, by name; their regions, by key).
        """
        local_counters = {"version": self.version, "optimizer_steps": self.optimizer_steps, "skips": self.skips.state()}
        counters = (
            broadcast(self.world, local_counters, self.mesh.ranks, (0,)) or local_counters
        )  # only members count steps
        if not self.version:  # never updated: the weights are the folder's
            return counters, {}, {}
        with self.call("save_state"):
            if not self.member:
                return counters, {}, {}
            self.make_optimizer()
            tensors, regions = optimizer_checkpoint.save(self.name, self.engine)
        return counters, tensors, regions

    def load_state(self, counters: Mapping[str, Any], source: optimizer_checkpoint.Source) -> None:
        """Restore a `save_state`, written under any layout. A role call."""
        self.version, self.optimizer_steps = counters["version"], counters["optimizer_steps"]
        self.skips.restore(counters["skips"])
        if not self.version:
            return
        with self.call("load_state"):
            if self.member:
                self.make_optimizer()
                optimizer_checkpoint.load(self.name, self.engine, source, self.optimizer_steps)

    def _check_versions(self, loss: LossFunction, samples: Samples) -> None:
        """Raises ValueError for samples of earlier weights with a `one_step` loss, which would silently be wrong."""
        version_BT = samples.version_BT if self.samples_itself else None
        if version_BT is not None and takes_one_step(loss) and (version_BT[samples.mask_BT] != self.version - 1).any():
            raise ValueError(
                "the samples were generated with earlier weights (stream.lag, stream.step_tokens), and the loss is valid for "
                "samples of the current weights only; set stream.lag=0 and stream.step_tokens=null, or use decoupled_surrogate."
            )

    def _step(self, loss: LossFunction, together: int, samples: Samples, fields: dict[str, Any]) -> StepReport:
        """One optimizer step on this data shard's rows of a minibatch."""
        samples = replace(samples, mask_BT=counted(loss, samples.mask_BT, fields))
        totals = self._totals(samples)
        if self.skip_empty and not totals.tokens:
            return StepReport({}, totals, {EMPTY: 1.0})
        self.make_optimizer()
        tree = self.context_tree(samples)
        batches = self.microbatches(tree, self.config.micro_tokens, together)
        packed = self.packed(samples, batches, tree)
        minibatch_loss = MinibatchLoss(
            loss,
            samples,
            fields,
            batches,
            totals,
            self.config,
            max_response=self.max_response,
            device=self.world.device,
            version=self.version - 1 if self.samples_itself else None,
        )
        self.engine.backward(packed, minibatch_loss)
        sums = minibatch_loss.sums
        distinct, computed = sum(map(tree.tokens, batches)), sum(map(self.engine.computed_tokens, packed))
        add_work(sums, int(tree.contexts.length_C.sum()), distinct, computed)
        gather_advantages(sums, fields, samples.mask_BT)
        reduced = reduce_sums(self.engine, self.world, self.mesh.ranks, sums)
        norm = self.engine.grad_norm()
        failure = self._not_finite(reduced.get("sum/loss", 0.0), norm)
        if failure:
            stop_reason = self.skips.step_skipped()
            if stop_reason:
                self._stop(failure, stop_reason, samples, fields, minibatch_loss.outputs)
            return StepReport(reduced, totals, {"grad_norm": norm, SKIPPED: 1.0})
        self.skips.step_taken()
        return StepReport(reduced, totals, {"grad_norm": norm, "lr": self._optimizer_step(norm)})

    def _imbalance(self, rows: BatchRows) -> float:
        """The metric: fraction of time that data-parallel ranks wait for the most loaded one, 0 to 1."""
        assert rows.lengths is not None
        minibatches = self.config.minibatches
        shares = rows.shares(self.mesh.data, minibatches, self.cost)
        return idle(rows.lengths, shares, rows.group_size, minibatches, self.cost)

    def _optimizer_step(self, norm: float) -> float:
        """Update the weights by the present gradients, whose norm is `norm`. Returns the learning rate."""
        lr = learning_rate(self.config.optimizer, self.optimizer_steps, self.total_steps)
        self.engine.step(lr, norm)
        self.optimizer_steps += 1
        return lr

    def _not_finite(self, loss: float, norm: float) -> str | None:
        """Which number is not finite on any of the role's ranks, as text, or None; collective over the role's ranks."""
        code = 2.0 if not math.isfinite(loss) else 1.0 if not math.isfinite(norm) else 0.0
        worst = self._max_over_ranks(code)
        if not worst:
            return None
        if worst == code:
            return f"the loss is {loss}" if code == 2 else f"the gradient norm is {norm}"
        return f"the {'loss' if worst == 2 else 'gradient norm'} is not finite on another rank"

    def _max_over_ranks(self, value: float) -> float:
        """The maximum over the role's ranks, on all of them."""
        if self.mesh.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return float(largest)

    def _stop(
        self,
        failure: str,
        stop_reason: str,
        samples: Samples,
        fields: dict[str, Any],
        outputs: Sequence[MicrobatchOutput],
    ) -> NoReturn:
        """Raise ValueError on all of the role's ranks, after every data shard has saved its rows of the batch."""
        step, section = self.world.journal.step, f"{self.section}.optimizer"
        failure = f"{failure} at optimizer step {self.optimizer_steps} of {self.name} (step {step} of the loop)"
        location = ""
        if self.offending is not None:
            folder, coordinates = self.offending / f"step_{step}", self.mesh.coordinates(self.world.rank)
            if self.world.rank == self.mesh.ranks[0]:
                begin_offending(folder)
            self._max_over_ranks(0.0)
            if coordinates["pipeline"] == self.mesh.last_stage and coordinates["tensor"] == coordinates["context"] == 0:
                description = {"role": self.name, "what": failure, "why": stop_reason}
                save_offending(folder, self.world.rank, samples, fields, outputs, description, self.spec.path)
            self._max_over_ranks(0.0)  # wait for all: the launcher ends every rank as soon as one has failed
            location = f" The batch is in {folder} (README.md beside it says how to load it)."
        raise ValueError(
            f"{failure}; {stop_reason}. The weights are those before it.{location} Lower {section}.lr, set {section}.clip_grad, or look at "
            "the batch's rewards."
        )

    def _totals(self, samples: Samples) -> Totals:
        """Trained tokens, and rows with one, of the minibatch over all data shards."""
        counts = [samples.mask_BT.sum().item(), samples.mask_BT.any(1).sum().item()]
        return Totals(*self.engine.all_reduce_data(torch.tensor(counts, dtype=torch.float64)).tolist())
