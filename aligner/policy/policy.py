"""The policy and reference roles: log-probabilities, updates, and weights as regions for whoever wants them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.megatron_layout import MegatronSide
from aligner.models.spec import ModelSpec
from aligner.objective.reduction import token_weights
from aligner.policy import cpu_megatron
from aligner.policy.accounts import MAXIMA, gather_metrics, over_steps
from aligner.policy.config import PolicyConfig
from aligner.policy.groups import make_groups, prepare_megatron
from aligner.policy.model import build_model
from aligner.policy.optimizer import Optimizer
from aligner.policy.packing import Packed, microbatches, pack
from aligner.policy.pipeline import Pipeline
from aligner.policy.schedule import learning_rate
from aligner.reshard.config import ReshardConfig
from aligner.spmd import columns
from aligner.spmd.mesh import Mesh
from aligner.spmd.partition import minibatch_groups
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World

if TYPE_CHECKING:
    from aligner.reshard.sync import WeightSync
    from aligner.rollout.role import Rollout

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Reference(Role):
    """A frozen model on Megatron-core: log-probabilities only."""

    def __init__(
        self,
        name: str,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: PolicyConfig,
        *,
        sequence_parallel: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(name, world, mesh)
        cpu_megatron.install()
        prepare_megatron()
        self.spec, self.config, self.temperature = spec, config, temperature
        self.multiple_of = mesh.tensor if sequence_parallel else 1
        groups = make_groups(world, mesh)
        if groups is None:
            return
        self.groups = groups
        self.model = build_model(
            spec, mesh, world.rank, groups, world.device, config.dtype, sequence_parallel, config.recompute
        )
        self.bytes_read = read_into(spec, self.model.layout, self.model.view)
        self.pipeline = Pipeline(self.model, groups, spec.vocab)
        self.is_last_stage = mesh.coordinates(world.rank)["pipeline"] == mesh.last_stage

    def logprobs(self, samples: Ref) -> Ref:
        """log p(token | tokens before it) under this model, after the sampling temperature.

        Returns:
            Ref to [B, T] float32, 0 outside `samples.mask_BT`.
        """
        with self.call("logprobs"):
            local = self.localize((samples,), {})
            value = self._logprobs(local.args[0]) if self.member else None
            return Ref(self, value, local.rows)

    def _logprobs(self, samples: Samples) -> Tensor:
        batches = microbatches(samples.length_B.tolist(), self.config.micro_tokens)
        self.model.train(False)
        logp_BT = torch.zeros(samples.tokens_BT.shape, device=self.world.device)
        found = self.pipeline.logprobs(self._packed(samples, batches), self.temperature)
        for rows, part_BT in zip(batches, found, strict=False):
            logp_BT[torch.tensor(rows), : part_BT.shape[1]] = part_BT
        if self.mesh.pipeline > 1:
            dist.broadcast(logp_BT, dist.get_global_rank(self.groups.pp, self.mesh.last_stage), group=self.groups.pp)
        return torch.where(samples.mask_BT, logp_BT.cpu(), 0.0)

    def _packed(self, samples: Samples, batches: list[list[int]]) -> list[Packed]:
        """This shard's microbatches, and after them as many that weigh nothing as the others' collectives need."""
        count = max(1, len(batches))
        if self.mesh.expert > 1:  # every microbatch exchanges tokens with the shards that hold the other experts
            most = torch.tensor(count)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.dp)
            count = int(most)
        if self.mesh.virtual_pipeline > 1:  # its schedule works in groups of as many microbatches as stages
            count += -count % self.mesh.pipeline
        nothing = pack(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]), self.multiple_of, self.world.device)
        return [self._pack(samples, rows) for rows in batches] + [nothing] * (count - len(batches))

    def _pack(self, samples: Samples, rows: list[int]) -> Packed:
        part = columns.take(samples, rows)
        width = int(part.length_B.max())
        return pack(part.tokens_BT[:, :width], part.length_B, self.multiple_of, self.world.device)


class Policy(Reference):
    """The trained model."""

    def __init__(
        self,
        *args: Any,
        total_steps: int = 0,
        max_response: int = 0,
        reshard: ReshardConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reshard = reshard or ReshardConfig()
        self.optimizer_steps, self.total_steps, self.max_response = 0, total_steps, max_response
        self.syncs: dict[str, WeightSync] = {}
        if self.member:
            self.optimizer = Optimizer(self.model, self.config.optimizer, self.groups)

    def update(self, loss: LossFunction, samples: Ref, **fields: Any) -> Ref:
        """Optimizer steps on one batch: `policy.epochs` passes over `policy.minibatches` minibatches.

        Args:
            loss: `loss(policy_logp_BT, mask_BT=..., <fields it names>) -> (loss_BT, metrics)`, per token and not
                reduced; it may also name rollout_logp_BT and entropy_BT.
            fields: row-wise Refs (or plain values) handed to the loss by name.

        Returns:
            Ref to {metric: float}: the loss, its metrics' means over the trained tokens (and `<name>_max`),
            grad_norm, lr, tokens.

        Raises:
            RuntimeError: the loss or the gradient is not finite.
        """
        with self.call("update"):
            local = self.localize((samples,), fields, self.config.minibatches)
            if not self.member:
                return Ref(self)
            assert local.rows is not None and local.rows.lengths is not None
            groups = len(local.rows.lengths) // local.rows.group_size
            ranges = minibatch_groups(groups, self.config.minibatches)
            steps = []
            for _ in range(self.config.epochs):
                for members in ranges:
                    mine = [i for i, row in enumerate(local.mine) if row // local.rows.group_size in members]
                    part = {name: _rows_of(value, mine, len(local.mine)) for name, value in local.kwargs.items()}
                    steps.append(self._step(loss, columns.take(local.args[0], mine), part))
            return Ref(self, over_steps(steps))

    def _step(self, loss: LossFunction, samples: Samples, fields: dict[str, Any]) -> dict[str, float]:
        """One optimizer step over this shard's rows of one minibatch."""
        counts = torch.tensor([samples.mask_BT.sum().item(), samples.mask_BT.any(1).sum().item()], dtype=torch.float64)
        counts = self._sum_over_data(counts)
        total_tokens, total_rows = counts.tolist()
        batches = microbatches(samples.length_B.tolist(), self.config.micro_tokens)
        sums: dict[str, Tensor] = {}
        wanted = inspect.signature(loss).parameters

        def of_microbatch(number: int, logp_BT: Tensor, entropy_BT: Tensor) -> Tensor:
            if number >= len(batches):
                return 0.0 * logp_BT.sum()
            part = columns.fit(columns.take(samples, batches[number]), logp_BT.shape[1])
            given = {name: self._to_device(_rows_of(v, batches[number], samples.rows)) for name, v in fields.items()}
            given["mask_BT"] = self._to_device(part.mask_BT)
            given["rollout_logp_BT"] = self._to_device(part.rollout_logp_BT)
            given["entropy_BT"] = entropy_BT
            given = {name: columns.fit(value, logp_BT.shape[1]) for name, value in given.items() if name in wanted}
            loss_BT, metrics = loss(logp_BT, **given)
            mask_BT = self._to_device(part.mask_BT)
            weight_BT = token_weights(
                mask_BT,
                self.config.reduction,  # type: ignore[arg-type]
                total_tokens=total_tokens,
                total_rows=total_rows,
                fixed_length=self.config.fixed_length or self.max_response or None,
            )
            value = (loss_BT * weight_BT).sum()
            gather_metrics(sums, {"entropy": entropy_BT, **metrics}, MAXIMA, mask_BT)
            sums["sum/loss"] = (
                sums.get("sum/loss", torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu()
            )
            return value

        self.model.train()
        self.optimizer.zero_grad()
        self.pipeline.backward(self.optimizer.chunks, self._packed(samples, batches), self.temperature, of_microbatch)
        metrics = self._reduce(sums, total_tokens)
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise RuntimeError(
                f"the loss is {metrics['loss']} at optimizer step {self.optimizer_steps}; the weights are as before it. "
                "Lower policy.optimizer.lr, set policy.optimizer.clip_grad, or look at the batch's rewards."
            )
        lr = learning_rate(self.config.optimizer, self.optimizer_steps, self.total_steps)
        metrics["grad_norm"] = self.optimizer.step(lr)
        if not math.isfinite(metrics["grad_norm"]):
            raise RuntimeError(
                f"the gradient norm is {metrics['grad_norm']} at optimizer step {self.optimizer_steps}. "
                "Lower policy.optimizer.lr or look at the batch's rewards."
            )
        self.optimizer_steps += 1
        return {**metrics, "lr": lr, "tokens": total_tokens}

    def _to_device(self, value: Any) -> Any:
        return value.to(self.world.device, non_blocking=True) if isinstance(value, Tensor) else value

    def _sum_over_data(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(value, op=op, group=self.groups.dp)
        return value

    def _reduce(self, sums: dict[str, Tensor], total_tokens: float) -> dict[str, float]:
        """Means and maxima over the data shards, on every rank of the role; summed in float64 on the host."""
        gathered: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(gathered, sorted(sums), group=self.group)
        every = sorted({name for found in gathered for name in found})
        minus_infinity = torch.tensor(-math.inf, dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        added = [name for name in every if name.startswith("sum/")]
        topped = [name for name in every if name.startswith("max/")]
        total = torch.stack([sums.get(n, zero) for n in added] or [zero])
        top = torch.stack([sums.get(n, minus_infinity) for n in topped] or [zero])
        self._sum_over_data(total)
        self._sum_over_data(top, dist.ReduceOp.MAX)
        if self.mesh.pipeline > 1:
            source = dist.get_global_rank(self.groups.pp, self.mesh.last_stage)
            dist.broadcast(total, source, group=self.groups.pp)
            dist.broadcast(top, source, group=self.groups.pp)
        found = {name[4:] + "_max": value for name, value in zip(topped, top.tolist(), strict=False)}
        for name, value in zip(added, total.tolist(), strict=False):
            found[name[4:]] = value if name == "sum/loss" else value / max(total_tokens, 1.0)
        return found

    def reshard_to(self, rollout: Rollout) -> None:
        """Bring the rollout engine the weights as they are now; a proof of the sync is in its ledger row."""
        from aligner.reshard.sync import WeightSync

        with self.call("reshard_to"):
            if rollout.name not in self.syncs:
                self.syncs[rollout.name] = WeightSync(self, rollout, self.reshard)
            self.syncs[rollout.name].run()

    def save_checkpoint(self, folder: str | Path, dtype: str | None = None) -> None:
        """Write a Hugging Face checkpoint (config, safetensors, tokenizer) from the ranks that hold the weights."""
        with self.call("save_checkpoint"):
            if self.member:
                export_checkpoint(
                    self.world.rank,
                    MegatronSide(self.spec, self.mesh, self.config.dtype),
                    self.model.view,
                    self.group,
                    Path(folder),
                    self.spec,
                    dtype or self.config.dtype,
                )


def _rows_of(value: Any, rows: list[int], total: int) -> Any:
    """The rows of a row-wise value; anything else (a number, None) as it is."""
    return columns.take(value, rows) if isinstance(value, Tensor) and value.dim() and len(value) == total else value
