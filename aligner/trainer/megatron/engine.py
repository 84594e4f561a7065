"""Megatron-core as a `TrainEngine`: tensor, pipeline, context, expert and data parallelism, and its distributed optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.trainer.engine import MicrobatchLoss, OptimizerSlice, TrainEngine
from aligner.trainer.megatron.cpu import install
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.model import DTYPES, ShardedModel, build_model
from aligner.trainer.megatron.optimizer import Optimizer
from aligner.trainer.megatron.optimizer_state import make_moments, optimizer_tensors, saved_pieces, slices
from aligner.trainer.megatron.pipeline import Pipeline
from aligner.trainer.offload import Offloaded, Scratch
from aligner.trainer.packing import Packed, pack
from aligner.trainer.prefix_attention import attended, computed_tokens
from aligner.trainer.prefix_tree import Segment
from aligner.trainer.readout import Readout
from aligner.trainer.row_contexts import RowContexts

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from aligner.models.spec import ModelSpec
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part
    from aligner.spmd.world import World
    from aligner.trainer.config import TrainingConfig


class MegatronEngine(TrainEngine):
    """A GPTModel of Megatron-core, its pipeline schedule and its optimizer, with process groups of the role's own."""

    shares_prefixes = True

    def __init__(
        self,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: TrainingConfig,
        readout: Readout,
        groups: ProcessGroupCollection,
        sequence_parallel: bool,
    ) -> None:
        self.world, self.mesh, self.spec, self.config, self.groups = world, mesh, spec, config, groups
        self.multiple_of = mesh.tensor if sequence_parallel else 1
        self.model = build_model(
            spec,
            mesh,
            world.rank,
            groups,
            world.device,
            config.dtype,
            sequence_parallel,
            config.recompute,
            config.experts,
        )
        self.pipeline = Pipeline(self.model, groups, readout, spec.vocab, world.activity.tick)
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
        """Make Megatron's process groups for the mesh and, on its ranks, the model with zero weights."""
        install()
        prepare_megatron()
        groups = make_groups(world, mesh)
        return cls(world, mesh, spec, config, readout, groups, sequence_parallel) if groups is not None else None

    @property
    def weights(self) -> ShardedModel:
        """Megatron's parameters, by the regions of `MegatronLayout`."""
        return self.model

    def pack(
        self, tokens_BT: Tensor, contexts: RowContexts, wanted_BT: Tensor, segments: Sequence[Segment] = ()
    ) -> Packed:
        """Padded to a multiple of the tensor-parallel size under sequence parallelism, split over context-parallel ranks. Under
        sequence parallelism, where each tensor rank has its share of the tokens, the last layer computes all."""
        context, rank = self.mesh.context, self.mesh.coordinates(self.world.rank)["context"]
        keep = None if self.model.config.sequence_parallel else self.pipeline.readout.uses
        return pack(tokens_BT, contexts, self.multiple_of, self.world.device, context, rank, wanted_BT, segments, keep)

    def microbatch_count(self, needed: int) -> int | None:
        """Equal on all data shards under expert parallelism, which exchanges tokens between them; a multiple of the pipeline
        stages for a virtual pipeline, as its schedule requires."""
        if self.mesh.expert == 1 and self.mesh.pipeline == 1:
            return None
        count = needed
        if self.mesh.expert > 1:
            count = int(self.all_reduce_data(torch.tensor(count), dist.ReduceOp.MAX))
        if self.mesh.virtual_pipeline > 1:
            count += -count % self.mesh.pipeline
        return count

    def computed_tokens(self, batch: Packed) -> int:
        """Includes the padding of attention calls that segments of similar length share, where there are such."""
        lengths, parents = (tuple(column) for column in batch.segments_S2.T.tolist())
        query = torch.empty(0, self.spec.head_dim, dtype=DTYPES[self.config.dtype], device=self.world.device)
        return attended(lengths, parents) if self.mesh.context > 1 else computed_tokens(lengths, parents, query)

    def forward(self, batches: Sequence[Packed]) -> list[Tensor]:
        """Runs the pipeline; one broadcast copies the results from its last stage to the others."""
        self.model.train(False)
        results = self.pipeline.forward(batches)
        if self.mesh.pipeline == 1:
            return results
        shapes = [(batch.rows, batch.width)[: self.pipeline.readout.dims] for batch in batches]
        ends = list(accumulate(torch.Size(shape).numel() for shape in shapes))
        flat = (
            torch.cat([result.flatten() for result in results])
            if results
            else torch.empty(ends[-1], device=self.world.device)
        )
        self.broadcast_output(flat)
        parts = flat.tensor_split(ends[:-1])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def backward(self, batches: Sequence[Packed], loss: MicrobatchLoss) -> None:
        """Megatron's forward-backward schedule, then its reduction of gradients."""
        self.model.train()
        self.optimizer.zero_grad()
        self.pipeline.backward(self.optimizer.chunks, batches, loss)

    def grad_norm(self) -> float:
        """Megatron's norm, over all ranks of the role."""
        return self.optimizer.norm()

    def step(self, lr: float, norm: float) -> None:
        """Clip, take an AdamW step, and all-gather the new parameters over data-parallel ranks."""
        self.optimizer.step(lr, norm)

    def all_reduce_data(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce over Megatron's data-parallel group."""
        dist.all_reduce(value, op=op, group=self.groups.dp)
        return value

    def broadcast_output(self, value: Tensor) -> Tensor:
        """Broadcast from the last pipeline stage."""
        if self.mesh.pipeline > 1:
            source = dist.get_global_rank(self.groups.pp, self.mesh.last_stage)
            dist.broadcast(value, source, group=self.groups.pp)
        return value

    def make_optimizer(self) -> None:
        """Make the data-parallel wrapper, which moves the parameters into flat buffers, and AdamW."""
        if self._optimizer is None:
            overlap = self.config.overlap_grad_reduce
            self._optimizer = Optimizer(
                self.model, self.config.optimizer, self.groups, self.world.cpu_collectives, overlap=overlap
            )

    @property
    def optimizer(self) -> Optimizer:
        """Megatron's optimizer; requires `make_optimizer`."""
        assert self._optimizer is not None, "make_optimizer has not been called"
        return self._optimizer

    def optimizer_slices(self) -> Sequence[OptimizerSlice]:
        """With a distributed optimizer each data-parallel rank has a part of each parameter."""
        return slices(self.optimizer, self.model)

    def saves(self, piece: Piece) -> bool:
        """The lowest of the ranks that hold the same range saves it."""
        return (piece.name, piece.storage) in self._saved

    @cached_property
    def _saved(self) -> frozenset[tuple[str, str]]:
        distributed = self.config.optimizer.distributed
        return saved_pieces(self.world.rank, self.model.layout, self.spec, self.mesh, distributed)

    def reset_moments(self, steps: int) -> None:
        """Resets each optimizer in Megatron's chain."""
        make_moments(self.optimizer, steps)

    def parts(self) -> Mapping[str, Part]:
        """Parameters; Megatron's gradient buffers; masters and moments, as far as they exist."""
        stream = self.world.residency.stream

        def weights() -> list[Tensor]:
            return [parameter.data for parameter in self.model.parameters.values()]

        def gradients() -> list[Tensor]:
            return self._optimizer.gradient_buffers() if self._optimizer else []

        def state() -> list[Tensor]:
            return optimizer_tensors(self._optimizer, [*weights(), *gradients()]) if self._optimizer else []

        return {
            "weights": Offloaded(weights, stream),
            "gradients": Scratch(gradients),
            "optimizer": Offloaded(state, stream),
        }

    @classmethod
    def random_states(cls) -> dict[str, Tensor]:
        """Those of Megatron's tracker, which has one generator for each kind of parallel region."""
        states = get_cuda_rng_tracker().get_states()
        return {name: state for name, state in states.items() if isinstance(state, Tensor)}

    @classmethod
    def set_random_states(cls, states: Mapping[str, Tensor]) -> None:
        """Restores those of Megatron's tracker."""
        tracker = get_cuda_rng_tracker()
        tracker.set_states({**tracker.get_states(), **states})
