"""`ModelRole`: a model on a training backend: loading, forward passes over a batch, export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.cost import row_cost
from aligner.models.spec import ModelSpec
from aligner.reshard.weights import RemoteWeights, ShardedWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.residency import Kind
from aligner.spmd.role import Role
from aligner.spmd.world import World
from aligner.trainer.config import MIN_SHARED_TOKENS, TrainingConfig
from aligner.trainer.engine import TrainEngine
from aligner.trainer.engines import backend
from aligner.trainer.packing import Keep, Packed, even_microbatches, microbatches, row_units
from aligner.trainer.prefix_tree import find_prefixes
from aligner.trainer.readout import Readout
from aligner.trainer.row_contexts import ContextTree, contexts_of, separate, whole_rows


class ModelRole(Role, ABC):
    """A model on the training backend `config.engine`; its role calls return its `readout`: log-probabilities, values or scores."""

    needs: ClassVar[Mapping[str, Sequence[str]]] = dict.fromkeys(
        ("logprobs", "values", "scores", "save_checkpoint", "reshard_to", "generate"), ("weights",)
    )
    reads = frozenset(needs)
    kinds: ClassVar[Mapping[str, Kind]] = {"weights": Kind(copied=True)}
    frozen: ClassVar[bool] = True
    """Whether its weights never change."""

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
        """Build and load the model; collective over the world.

        Args:
            sequence_parallel: split activations along the sequence between tensor-parallel ranks.

        Raises:
            ValueError: the training backend cannot run the model, or a file of its folder is missing or damaged.
        """
        super().__init__(name, world, mesh, row_cost(spec))
        self.spec, self.config = spec, config
        self.engine_type = backend(config.engine).engine_type()
        world.residency.make_room(name, mesh)
        self._engine = self.engine_type.build(
            world, mesh, spec, config, self.readout(), sequence_parallel=sequence_parallel, frozen=self.frozen
        )
        parts = self._engine.parts() if self._engine else {}
        world.residency.register(name, mesh, self.kinds, {kind: parts[kind] for kind in self.kinds if kind in parts})
        if self._engine:
            self.bytes_read = read_into(spec, self.weights.pieces(), self.weights.view)

    @property
    def engine(self) -> TrainEngine:
        """The training engine; on the role's ranks only."""
        assert self._engine is not None, f"rank {self.world.rank} is not one of {self.name}'s"
        return self._engine

    @cached_property
    def weights(self) -> ShardedWeights:
        """The model's weights as the source of a weight sync or an export; on every rank of the world."""
        if self._engine is not None:
            return self._engine.weights
        return RemoteWeights(backend(self.config.engine).layout(self.spec, self.mesh, self.config))

    @abstractmethod
    def readout(self) -> Readout:
        """What this kind of role computes from its head's output."""

    def forward(self, samples: Samples) -> Tensor:
        """The first readout of this data shard's rows, on every rank that holds them: [B] or [B, T] float32, on the host.

        [B, T] is 0 outside `samples.mask_BT` and at the first token of each row and segment.
        """
        tree = self.context_tree(samples)
        batches = self.microbatches(tree, self.config.forward_micro_tokens or self.config.micro_tokens)
        results = self.engine.forward(self.packed(samples, batches, tree))
        out = torch.zeros(samples.tokens_BT.shape[: results[0].dim()], device=self.world.device)
        for rows, result in zip(batches, results, strict=True):
            if rows:
                (out if result.dim() == 1 else out[:, : result.shape[1]])[torch.tensor(rows)] = result
        return out.cpu()

    def context_tree(self, samples: Samples) -> ContextTree:
        """What is computed of this data shard's rows: each segment by itself (for a score only the last one of a row), the common
        prefixes once, by `config.share_prefix`."""
        contexts = contexts_of(samples, ends_only=self.readout().uses is Keep.ENDS)
        min_tokens = MIN_SHARED_TOKENS[self.config.share_prefix]
        if min_tokens is None or not self.engine.shares_prefixes:
            return separate(contexts)
        return ContextTree(contexts, find_prefixes(contexts.tokens(samples.tokens_BT), contexts.length_C, min_tokens))

    def microbatches(self, tree: ContextTree, budget: int, together: int = 1) -> list[list[int]]:
        """Row indices of each microbatch of this data shard; their number is the one that the engine needs.

        Empty microbatches contribute nothing; they only take part in the collectives.

        Args:
            tree: this data shard's rows.
            budget: maximum computed tokens of one microbatch (a longer row becomes a microbatch of its own).
            together: groups of this many consecutive rows are never split.
        """
        units = row_units(tree, budget, together, self.cost)
        batches = microbatches(units, budget) or [[]]
        count = self.engine.microbatch_count(len(batches))
        return batches if count is None else even_microbatches(units, budget, count)

    def packed(self, samples: Samples, batches: list[list[int]], tree: ContextTree) -> list[Packed]:
        """These microbatches, packed for the engine."""
        blank_BT = torch.zeros(1, 2, dtype=torch.long)
        empty = self.engine.pack(blank_BT, whole_rows(torch.tensor([2])), blank_BT.bool())
        return [self._pack(samples, rows, tree) if rows else empty for rows in batches]

    def _pack(self, samples: Samples, rows: list[int], tree: ContextTree) -> Packed:
        longest = int(samples.length_B[rows].max())
        tokens_BT, wanted_BT = samples.tokens_BT[rows, :longest], samples.mask_BT[rows, :longest]
        segments = tree.segments(rows) if self.engine.shares_prefixes else ()
        return self.engine.pack(tokens_BT, tree.contexts.take(rows), wanted_BT, segments)

    def save_checkpoint(self, folder: str | Path, dtype: str | None = None, run: str | None = None) -> None:
        """Write a Hugging Face checkpoint (config, safetensors, tokenizer) from the ranks that hold the weights.

        Args:
            dtype: data type of the written weights; None: `config.dtype`.
            run: the run that owns the folder (see `export_checkpoint`); None: no run.
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
        """Implements the role call `method`: `forward` of the batch; a [B, T] result is 0 outside `samples.mask_BT`."""
        with self.call(method):
            local = self.localize((samples,), {})
            if not self.member:
                return Ref(self, None, local.rows)
            return Ref(self, self.forward(local.args[0]), local.rows)
