"""What every role on Megatron-core shares: a model built and loaded over its ranks, run over a batch, and exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.cost import row_cost
from aligner.models.spec import ModelSpec
from aligner.reshard.weights import RemoteWeights, ShardedWeights
from aligner.spmd import batch_ops as columns
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.residency import Kind, Part
from aligner.spmd.role import Role
from aligner.spmd.world import World
from aligner.trainer import offload
from aligner.trainer.config import TrainingConfig
from aligner.trainer.megatron import cpu as cpu_megatron
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.layout import MegatronLayout
from aligner.trainer.megatron.model import build_model
from aligner.trainer.megatron.pipeline import Pipeline
from aligner.trainer.megatron.weights import MegatronWeights
from aligner.trainer.packing import Packed, even_microbatches, microbatches, pack
from aligner.trainer.readout import Readout


class ModelRole(Role):
    """A model on Megatron-core whose last stage makes of a batch what `readout` says."""

    needs: ClassVar[Mapping[str, Sequence[str]]] = dict.fromkeys(
        ("logprobs", "values", "scores", "save_checkpoint", "reshard_to"), ("weights",)
    )
    reads = frozenset(needs)
    kinds: ClassVar[Mapping[str, Kind]] = {"weights": Kind(copied=True)}

    def __init__(
        self,
        name: str,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: TrainingConfig,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(name, world, mesh, row_cost(spec))
        cpu_megatron.install()
        prepare_megatron()
        self.spec, self.config = spec, config
        self.multiple_of = mesh.tensor if sequence_parallel else 1
        groups = make_groups(world, mesh)
        world.residency.make_room(name, mesh)
        world.residency.register(name, mesh, self.kinds, self.parts() if groups else None)
        if groups is None:
            return
        self.groups = groups
        self.model = build_model(
            spec, mesh, world.rank, groups, world.device, config.dtype, sequence_parallel, config.recompute
        )
        self.bytes_read = read_into(spec, self.model.layout, self.model.view)
        self.pipeline = Pipeline(self.model, groups, self.readout(), world.activity.tick)

    @cached_property
    def weights(self) -> ShardedWeights:
        """The model's weights as the source of a weight sync or an export; on every rank of the world."""
        layout = MegatronLayout(self.spec, self.mesh, self.config.dtype)
        return MegatronWeights(layout, self.model) if self.member else RemoteWeights(layout)

    def parts(self) -> dict[str, Part]:
        """What this rank holds; asked before the model is built, and nothing is moved before it is."""
        return {"weights": offload.Offloaded(lambda: offload.weights(self.model), self.world.residency.stream)}

    def readout(self) -> Readout:
        """What this kind of role makes of its head's output."""
        raise NotImplementedError

    def forward(self, samples: Samples) -> Tensor:
        """The readout of this shard's rows, on every rank that holds them: [B] or [B, T] float32, on the host.

        [B, T] is 0 at each row's first token and beyond its last; the caller applies the mask.
        """
        batches = self.microbatches(samples, self.config.forward_micro_tokens or self.config.micro_tokens)
        self.model.train(False)
        out = torch.zeros(samples.tokens_BT.shape[: self.pipeline.readout.dims], device=self.world.device)
        found = self.pipeline.forward(self.packed(samples, batches))
        for rows, part in zip(batches, found, strict=False):
            if rows:
                (out if part.dim() == 1 else out[:, : part.shape[1]])[torch.tensor(rows)] = part
        if self.mesh.pipeline > 1:
            dist.broadcast(out, dist.get_global_rank(self.groups.pp, self.mesh.last_stage), group=self.groups.pp)
        return out.cpu()

    def microbatches(self, samples: Samples, budget: int, together: int = 1) -> list[list[int]]:
        """This shard's rows of each microbatch; empty ones weigh nothing, and are there for the others' collectives.

        Data shards that exchange tokens with each other's experts have equally many, and pipelines microbatches of
        nearly equal cost.
        """
        lengths = samples.length_B.tolist()
        found = microbatches(lengths, budget, together) or [[]]
        if self.mesh.expert == 1 and self.mesh.pipeline == 1:
            return found
        count = len(found)
        if self.mesh.expert > 1:
            most = torch.tensor(count)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.dp)
            count = int(most)
        if self.mesh.virtual_pipeline > 1:  # its schedule works in groups of as many microbatches as stages
            count += -count % self.mesh.pipeline
        return even_microbatches(lengths, budget, together, count, self.cost)

    def packed(self, samples: Samples, batches: list[list[int]]) -> list[Packed]:
        """These microbatches as the model sees them."""
        nothing = self._cut(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]))
        return [self._pack(samples, rows) if rows else nothing for rows in batches]

    def _pack(self, samples: Samples, rows: list[int]) -> Packed:
        part = columns.take(samples, rows)
        return self._cut(part.tokens_BT[:, : int(part.length_B.max())], part.length_B)

    def _cut(self, tokens_BT: Tensor, length_B: Tensor) -> Packed:
        context = self.mesh.coordinates(self.world.rank)["context"]
        return pack(tokens_BT, length_B, self.multiple_of, self.world.device, self.mesh.context, context)

    def save_checkpoint(self, folder: str | Path, dtype: str | None = None, run: str | None = None) -> None:
        """Write a Hugging Face checkpoint (config, safetensors, tokenizer) from the ranks that hold the weights.

        Args:
            run: whose the folder is (see `export_checkpoint`); None: no run's.
        """
        with self.call("save_checkpoint"):
            if self.member:
                export_checkpoint(
                    self.world.rank,
                    self.weights.layout,
                    self.weights.view,
                    self.group,
                    Path(folder),
                    self.spec,
                    dtype or self.config.dtype,
                    run=run,
                )

    def read(self, method: str, samples: Ref) -> Ref:
        """The role call `method`: `forward` of the batch, 0 outside `samples.mask_BT` where it is [B, T]."""
        with self.call(method):
            local = self.localize((samples,), {})
            if not self.member:
                return Ref(self, None, local.rows)
            mine: Samples = local.args[0]
            value = self.forward(mine)
            return Ref(self, value if value.dim() == 1 else torch.where(mine.mask_BT, value, 0.0), local.rows)
