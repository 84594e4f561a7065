"""torch FSDP2 as a `TrainEngine`: any of transformers' language models, fully sharded over the role's ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from aligner.reshard.plan.region import Piece
from aligner.trainer.engine import MicrobatchLoss, OptimizerSlice, TrainEngine
from aligner.trainer.fsdp.checks import check_runs
from aligner.trainer.fsdp.collectives import begin_sums
from aligner.trainer.fsdp.layout import FsdpLayout
from aligner.trainer.fsdp.model import DTYPES, ShardedModel, build_model, local_part
from aligner.trainer.fsdp.optimizer import Gradients, Optimizer
from aligner.trainer.offload import Offloaded
from aligner.trainer.packing import Packed, pack
from aligner.trainer.prefix_tree import Segment
from aligner.trainer.readout import Readout
from aligner.trainer.row_contexts import RowContexts

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part
    from aligner.spmd.world import World
    from aligner.trainer.config import TrainingConfig


class FsdpEngine(TrainEngine):
    """transformers' model on one rank of the role.

    A single rank needs no sharding: there the model is transformers' own, except for a model that learns in bfloat16, whose
    float32 masters FSDP casts.
    """

    def __init__(
        self,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: TrainingConfig,
        readout: Readout,
        groups: Mapping[str, dist.ProcessGroup],
        frozen: bool,
    ) -> None:
        self.world, self.mesh, self.spec, self.config, self._groups = world, mesh, spec, config, groups
        self.frozen = frozen
        chosen = config.reshard_after_forward
        self._reshards = world.device.type != "cpu" if chosen is None else chosen
        layout = FsdpLayout(spec, mesh, config.dtype if frozen else "float32")
        sharded = mesh.size > 1 or (config.dtype != "float32" and not frozen)
        self.model = build_model(
            spec,
            layout,
            world.rank,
            world.device,
            _device_mesh(world, mesh, groups) if sharded else None,
            readout,
            collectives=world.cpu_collectives(groups["shard"]) if sharded else None,
            dtype=DTYPES[config.dtype],
            frozen=frozen,
            recompute=config.recompute,
            reshard_after_forward=self._reshards,
        )
        self._optimizer: Optimizer | None = None

    @classmethod
    def build(
        cls,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: TrainingConfig,
        readout: Readout,
        *,
        sequence_parallel: bool = False,
        frozen: bool = False,
    ) -> Self | None:
        """Make process groups for the mesh and, on its ranks, the model."""
        check_runs(spec, mesh, config, sequence_parallel, cpu=world.device.type == "cpu")
        groups = {
            "all": world.group(mesh.ranks),
            "shard": world.my_group(mesh.replica_ranks),
            "replicate": world.my_group(tuple(zip(*mesh.replica_ranks, strict=True))),
        }
        if world.rank not in mesh.ranks:
            return None
        present = {name: group for name, group in groups.items() if group is not None}
        return cls(world, mesh, spec, config, readout, present, frozen)

    @property
    def shares_prefixes(self) -> bool:  # type: ignore[override]
        """Wherever attention is that of torch's kernels."""
        return not self.model.root.rows.explicit

    @property
    def weights(self) -> ShardedModel:
        """Each rank's rows of transformers' parameters, by the regions of `FsdpLayout`."""
        return self.model

    def pack(
        self, tokens_BT: Tensor, contexts: RowContexts, wanted_BT: Tensor, segments: Sequence[Segment] = ()
    ) -> Packed:
        """Without padding; the head gets the tokens that the readout uses."""
        keep = self.model.root.readout.uses
        return pack(tokens_BT, contexts, 1, self.world.device, wanted_BT=wanted_BT, segments=segments, keep=keep)

    def microbatch_count(self, needed: int) -> int | None:
        """Equal on all ranks, which gather each layer's weights together."""
        if self.mesh.size == 1:
            return None
        return int(self.all_reduce_data(torch.tensor(needed), dist.ReduceOp.MAX))

    def computed_tokens(self, batch: Packed) -> int:
        """Includes the padding of attention calls that rows of similar length share, where there are such."""
        query = torch.empty(0, self.spec.head_dim, dtype=DTYPES[self.config.dtype], device=self.world.device)
        return self.model.root.rows.computed(batch, query)

    def forward(self, batches: Sequence[Packed]) -> list[Tensor]:
        """One forward pass after the other."""
        root, results = self.model.root, []
        with torch.no_grad():
            for batch in batches:
                self.world.activity.tick()
                results.append(next(iter(root(batch, first_only=True).values())))
        for module in self._fsdp_modules():
            module.reshard()  # what stays gathered would not see the weights change
        return results

    def backward(self, batches: Sequence[Packed], loss: MicrobatchLoss) -> None:
        """Gradients of microbatches are added up where they are made, and reduced over ranks with the last one's."""
        self.optimizer.zero_grad()
        root = self.model.root
        for number, batch in enumerate(batches):
            self.world.activity.tick()
            if isinstance(root, FSDPModule):
                last = number == len(batches) - 1
                root.set_requires_gradient_sync(last)
                root.set_is_last_backward(last)
                root.set_reshard_after_backward(last or self._reshards)
            loss(number, root(batch)).backward()
            if number == 0 and len(batches) > 1 and self.config.dtype != "float32":
                for module in self._fsdp_modules():
                    begin_sums(module)
        if self.mesh.size > 1:
            for gradient in self.optimizer.whole_gradients():
                dist.all_reduce(gradient, group=self._groups["all"])

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.root.modules() if isinstance(module, FSDPModule)]

    def grad_norm(self) -> float:
        """Over the shards of one replica; all replicas have the same."""
        return self.optimizer.norm()

    def step(self, lr: float, norm: float) -> None:
        """Each rank updates its shards."""
        self.optimizer.step(lr, norm)

    def all_reduce_data(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce over the role's ranks, each of which is a data shard."""
        if self.mesh.size > 1:
            dist.all_reduce(value, op=op, group=self._groups["all"])
        return value

    def broadcast_output(self, value: Tensor) -> Tensor:
        """There is no pipeline."""
        return value

    def make_optimizer(self) -> None:
        """AdamW over this rank's shards; parameters stay where they are."""
        if self._optimizer is None:
            assert not self.frozen, "a frozen model has no optimizer"
            group = self._groups["shard"] if self.model.layout.shards > 1 else None
            self._optimizer = Optimizer(self.model, self.config.optimizer, group)

    @property
    def optimizer(self) -> Optimizer:
        """Requires `make_optimizer`."""
        assert self._optimizer is not None, "make_optimizer has not been called"
        return self._optimizer

    def optimizer_slices(self) -> Sequence[OptimizerSlice]:
        """A rank's rows of each parameter."""
        return self.optimizer.slices()

    def saves(self, piece: Piece) -> bool:
        """The first replica saves its shards; its first rank what every rank has whole."""
        first = self.mesh.replica_ranks[0]
        return self.world.rank in (first[:1] if piece.storage in self.model.whole else first)

    def reset_moments(self, steps: int) -> None:
        """Resets every parameter's."""
        self.optimizer.reset_moments(steps)

    def parts(self) -> Mapping[str, Part]:
        """Shards of parameters, which are the masters; gradients; moments, as far as they exist."""
        stream = self.world.residency.stream

        def weights() -> list[Tensor]:
            return [local_part(parameter).detach() for parameter in self.model.parameters.values()]

        def state() -> Sequence[Tensor]:
            return self._optimizer.state_tensors() if self._optimizer else ()

        return {
            "weights": Offloaded(weights, stream),
            "gradients": Gradients(lambda: self._optimizer),
            "optimizer": Offloaded(state, stream),
        }

    @classmethod
    def random_states(cls) -> dict[str, Tensor]:
        """None: nothing here draws numbers."""
        return {}

    @classmethod
    def set_random_states(cls, states: Mapping[str, Tensor]) -> None:
        """None: a checkpoint of another backend may have some, of generators that are not used here."""


def _device_mesh(world: World, mesh: Mesh, groups: Mapping[str, dist.ProcessGroup]) -> DeviceMesh:
    """What FSDP shards over: the role's ranks, or replicas x shards of them; of groups that exist, without communication."""
    kind = world.device.type
    if mesh.replicas == 1:
        return DeviceMesh.from_group(groups["shard"], kind, mesh_dim_names=("shard",))
    return DeviceMesh.from_group(
        [groups["replicate"], groups["shard"]], kind, mesh=mesh.replica_ranks, mesh_dim_names=("replicate", "shard")
    )
