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
from aligner.spmd.rows import Rows
from aligner.trainer import optimizer_checkpoint
from aligner.trainer.loss_mean import LossFunction, Totals, counted, rows_together, takes_one_step
from aligner.trainer.model_role import ModelRole
from aligner.trainer.offending_batch import MicrobatchOutput, begin_offending, save_offending
from aligner.trainer.schedule import learning_rate
from aligner.trainer.skips import EMPTY, SKIPPED, NotFinite, Skips
from aligner.trainer.update import MinibatchLoss, reduce_sums, rows_of
from aligner.trainer.update_metrics import StepReport, account_work, gather_advantages, over_steps


class TrainableRole(ModelRole):
    """A `ModelRole` with an optimizer. `update(loss, samples)` takes `epochs` x `minibatches` optimizer steps."""

    section = "policy"
    """Where its settings stand in the configuration."""
    samples_itself = False
    """The rollout samples with its weights: `version_BT` of samples counts its updates."""
    needs: ClassVar[Mapping[str, Sequence[str]]] = {
        **ModelRole.needs,
        "update": ("weights", "gradients", "optimizer"),
        "save_state": ("weights", "optimizer"),
        "load_state": ("weights", "optimizer"),
    }
    reads = ModelRole.reads | {"save_state"}
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
            skip_empty: no optimizer step on a minibatch without a trained token, which would move weights by momentum.
            offending: folder for the batch that stops the job; None writes none.
        """
        super().__init__(*args, **kwargs)
        self.optimizer_steps, self.total_steps, self.max_response = 0, total_steps, max_response
        self.skips, self.skip_empty, self.offending = Skips(not_finite or NotFinite()), skip_empty, offending
        self.has_optimizer = False
        self.version = 0
        """Calls of `update` so far; the same on every rank of the world."""

    def make_optimizer(self) -> None:
        """Make gradient buffers and optimizer state, once; collective over the role's ranks."""
        if self.has_optimizer:
            return
        self.has_optimizer = True
        self.engine.make_optimizer()
        if self.config.dtype != "float32":
            optimizer_checkpoint.read_masters(self.spec, self.engine)

    @cached_property
    def description(self) -> dict[str, bytes]:
        """Files, by name, that make a folder of a training checkpoint a model: configuration and tokenizer."""
        return describe_training(self.spec, self.name)

    def update(self, loss: LossFunction, samples: Ref, **fields: Any) -> Ref:
        """Optimizer steps on one batch: `epochs` passes over `minibatches` minibatches.

        Args:
            loss: `loss(<the readout's result>, mask_BT=..., <fields it names>) -> (loss, metrics)`, not reduced: [B, T]
                per token, weighted by `reduction`, or [B] per row, for the mean over the rows with a trained token. It
                may also name rollout_logp_BT and the readout's further results (entropy_BT of a policy). Its attribute
                `rows_together` = n says that n consecutive rows belong together; no microbatch splits them. `counted_rows`
                says which rows it leaves out (see `counted`). `one_step` = True says that it is right only at the weights
                that sampled.
            fields: row-wise Refs (or plain values) handed to the loss by name.

        Returns:
            Ref to {metric: float}: the loss, its metrics' means over the trained tokens, or over the rows with one,
            (and `<name>_max`), grad_norm, lr, tokens; skipped_steps and empty_steps where some were left out; imbalance:
            the share of their time in which data shards wait for the one with the dearest rows, by `cost`; padding: the
            share of the computed tokens that are none of the rows'; shared_prefix: the share of the rows' tokens that were not
            computed, because another row of the microbatch has them too.

        Raises:
            ValueError: rows that belong together are not in one group of the batch; several steps by a loss for one.
            ValueError: losses or gradients were not finite, beyond what `guards.not_finite` allows; on every rank of the role.
        """
        self.version += 1
        if takes_one_step(loss) and self.config.epochs * self.config.minibatches > 1:
            raise ValueError(
                f"{self.section}.epochs={self.config.epochs} and {self.section}.minibatches={self.config.minibatches}: the "
                "loss has no ratio, so it is right for one step on a batch only; set both to 1, or take clipped_surrogate."
            )
        with self.call("update"):
            local = self.localize((samples,), fields, self.config.minibatches)
            if not self.member:
                return Ref(self)
            assert local.rows is not None and local.rows.lengths is not None
            self._check_versions(loss, local.args[0])
            size = local.rows.group_size
            together = rows_together(loss)
            if size % together:
                raise ValueError(
                    f"{self.name}.update: the loss needs groups of {together} consecutive rows, and the batch has groups "
                    f"of {size}; make them with scatter(batch, group_size={together}) or num_samples={together}."
                )
            ranges = minibatch_groups(len(local.rows.lengths) // size, self.config.minibatches)
            steps = []
            for _ in range(self.config.epochs):
                for members in ranges:
                    mine = [i for i, row in enumerate(local.mine) if row // size in members]
                    part = {name: rows_of(value, mine, len(local.mine)) for name, value in local.kwargs.items()}
                    steps.append(self._step(loss, together, batch_ops.take(local.args[0], mine), part))
            return Ref(self, {**over_steps(steps), "imbalance": self._imbalance(local.rows)})

    def save_state(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """(counts, complete on the first rank of the world; this rank's tensors; their regions). A role call."""
        mine = {"version": self.version, "optimizer_steps": self.optimizer_steps, "skips": self.skips.state()}
        known = broadcast(self.world, mine, self.mesh.ranks, (0,)) or mine  # only members count steps
        if not self.version:  # never updated: it is what its folder has
            return known, {}, {}
        with self.call("save_state"):
            if not self.member:
                return known, {}, {}
            self.make_optimizer()
            tensors, regions = optimizer_checkpoint.save(self.name, self.engine)
        return known, tensors, regions

    def load_state(self, known: Mapping[str, Any], source: optimizer_checkpoint.Source) -> None:
        """Go on from a `save_state`, whatever layout wrote it. A role call."""
        self.version, self.optimizer_steps = known["version"], known["optimizer_steps"]
        self.skips.restore(known["skips"])
        if not self.version:
            return
        with self.call("load_state"):
            if self.member:
                self.make_optimizer()
                optimizer_checkpoint.load(self.name, self.engine, source, self.optimizer_steps)

    def _check_versions(self, loss: LossFunction, samples: Samples) -> None:
        """ValueError for samples of earlier weights, with a loss that would silently take them for its own."""
        version_BT = samples.version_BT if self.samples_itself else None
        if version_BT is not None and takes_one_step(loss) and (version_BT[samples.mask_BT] != self.version - 1).any():
            raise ValueError(
                "the samples were drawn by earlier weights (stream.lag, stream.step_tokens), and the loss is right for the "
                "present ones only; set stream.lag=0 and stream.step_tokens=null, or take decoupled_surrogate."
            )

    def _step(self, loss: LossFunction, together: int, samples: Samples, fields: dict[str, Any]) -> StepReport:
        """One optimizer step over this shard's rows of one minibatch."""
        samples = replace(samples, mask_BT=counted(loss, samples.mask_BT, fields))
        totals = self._totals(samples)
        if self.skip_empty and not totals.tokens:
            return StepReport({}, totals, {EMPTY: 1.0})
        self.make_optimizer()
        tree = self.prefixes(samples)
        batches = self.microbatches(tree, self.config.micro_tokens, together)
        packed = self.packed(samples, batches, tree)
        of_microbatch = MinibatchLoss(
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
        self.engine.backward(packed, of_microbatch)
        sums = of_microbatch.sums
        account_work(
            sums,
            int(samples.length_B.sum()),
            sum(map(tree.tokens, batches)),
            sum(map(self.engine.computed_tokens, packed)),
        )
        gather_advantages(sums, fields, samples.mask_BT)
        reduced = reduce_sums(self.engine, self.world, self.mesh.ranks, sums)
        norm = self.engine.grad_norm()
        wrong = self._wrong(reduced.get("sum/loss", 0.0), norm)
        if wrong:
            too_many = self.skips.left_out()
            if too_many:
                self._stop(wrong, too_many, samples, fields, of_microbatch.outputs)
            return StepReport(reduced, totals, {"grad_norm": norm, SKIPPED: 1.0})
        self.skips.taken()
        return StepReport(reduced, totals, {"grad_norm": norm, "lr": self._descend(norm)})

    def _imbalance(self, rows: Rows) -> float:
        assert rows.lengths is not None
        minibatches = self.config.minibatches
        shares = rows.shares(self.mesh.data, minibatches, self.cost)
        return idle(rows.lengths, shares, rows.group_size, minibatches, self.cost)

    def _descend(self, norm: float) -> float:
        """The gradients that are there, of this norm -> new weights. Returns the learning rate."""
        lr = learning_rate(self.config.optimizer, self.optimizer_steps, self.total_steps)
        self.engine.step(lr, norm)
        self.optimizer_steps += 1
        return lr

    def _wrong(self, loss: float, norm: float) -> str | None:
        """What is not finite on any of the role's ranks; all of them say the same."""
        code = 2.0 if not math.isfinite(loss) else 1.0 if not math.isfinite(norm) else 0.0
        worst = self._most(code)
        if not worst:
            return None
        if worst == code:
            return f"the loss is {loss}" if code == 2 else f"the gradient norm is {norm}"
        return f"the {'loss' if worst == 2 else 'gradient norm'} is not finite on another rank"

    def _most(self, value: float) -> float:
        """The largest over the role's ranks, on all of them."""
        if self.mesh.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return float(largest)

    def _stop(
        self, wrong: str, too_many: str, samples: Samples, fields: dict[str, Any], outputs: Sequence[MicrobatchOutput]
    ) -> NoReturn:
        """End the job on all of the role's ranks, once every shard has written its rows of the batch."""
        step, setting = self.world.journal.step, f"{self.section}.optimizer"
        what = f"{wrong} at optimizer step {self.optimizer_steps} of {self.name} (step {step} of the loop)"
        where = ""
        if self.offending is not None:
            folder, at = self.offending / f"step_{step}", self.mesh.coordinates(self.world.rank)
            if self.world.rank == self.mesh.ranks[0]:
                begin_offending(folder)
            self._most(0.0)
            if at["pipeline"] == self.mesh.last_stage and at["tensor"] == at["context"] == 0:
                about = {"role": self.name, "what": what, "why": too_many}
                save_offending(folder, self.world.rank, samples, fields, outputs, about, self.spec.path)
            self._most(0.0)  # the launcher ends every rank when one has left
            where = f" The batch is in {folder} (README.md beside it says how to load it)."
        raise ValueError(
            f"{what}; {too_many}. The weights are as before it.{where} Lower {setting}.lr, set {setting}.clip_grad, or look at "
            "the batch's rewards."
        )

    def _totals(self, samples: Samples) -> Totals:
        counts = [samples.mask_BT.sum().item(), samples.mask_BT.any(1).sum().item()]
        return Totals(*self.engine.all_reduce_data(torch.tensor(counts, dtype=torch.float64)).tolist())
