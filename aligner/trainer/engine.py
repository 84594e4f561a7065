"""`TrainEngine`: the interface of a training backend. One engine is one model of one role, sharded over the role's ranks.

Roles, the update, packing, losses, metrics and checkpoints are written against this class alone; a backend (Megatron-core in
`trainer/megatron/`) implements it and is entered in `trainer/engines.py`.

Terms. A *data shard* is one data-parallel rank's share of a batch; all of its tensor, context and pipeline ranks get the same
rows. *Collective* says which ranks must enter a method together. *Output ranks* compute the head's output and the loss (the last pipeline stage;
every rank without pipeline parallelism).

Determinism: for given weights, batches and layout, every method returns bit-identical results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch.distributed as dist
from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.trainer.packing import Packed
from aligner.trainer.prefix_tree import Segment
from aligner.trainer.readout import Readout
from aligner.trainer.row_contexts import RowContexts

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.reshard.weights import ShardedWeights
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part
    from aligner.spmd.world import World
    from aligner.trainer.config import TrainingConfig

MicrobatchLoss = Callable[[int, dict[str, Tensor]], Tensor]
"""(index of the microbatch, its readouts by name) -> scalar: its contribution to the loss of the global batch. Called once for
each microbatch, in the order of the batches, on output ranks only; the readouts require gradients in `backward`."""

MASTER, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
"""Names in a checkpoint: the float32 master weights and AdamW's two moments."""


@dataclass(frozen=True)
class OptimizerSlice:
    """A flat range of one parameter whose optimizer state this rank holds."""

    storage: str
    """The parameter's name, as in the pieces of `TrainEngine.weights`."""
    start: int
    """First element of the range, counted over the flattened storage."""
    stop: int
    """One past the last."""
    master: Tensor
    """[stop - start] float32, writable: the weights that the optimizer updates. For a float32 model it may be the parameter itself."""
    moments: dict[str, Tensor]
    """MOMENTS by name, each like `master`; empty before the first step."""


class TrainEngine(ABC):
    """A model that runs packed microbatches and, once it has an optimizer, is trained.

    Lifecycle: `build` (weights undefined) -> the caller writes every piece of `weights` -> `forward` any number of times ->
    `make_optimizer` -> repeatedly `backward`, `grad_norm`, and `step` unless the step is skipped. `forward` may come between any two calls.

    `forward` and `backward` call `world.activity.tick()` at each microbatch: the watchdog takes a rank without progress for hung.
    """

    shares_prefixes: ClassVar[bool] = False
    """Whether the backend runs microbatches with segments that several rows share, and computes these once."""

    # ---- construction

    @classmethod
    @abstractmethod
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
        """Build this rank's shard of the model; the values of its weights are not defined yet.

        Collective over the world, because process groups are made here: every rank calls it with equal arguments.

        Args:
            mesh: the role's ranks and parallel sizes.
            readout: what output ranks compute from the head's output.
            sequence_parallel: split activations along the sequence between tensor-parallel ranks.
            frozen: nobody will call `make_optimizer`.

        Returns:
            The engine, or None on ranks outside `mesh`.

        Raises:
            ValueError: the backend cannot run this model under this mesh (`Backend.check` reports it before the job starts).
        """

    @property
    @abstractmethod
    def weights(self) -> ShardedWeights:
        """The model's weights as regions of checkpoint tensors, for weight sync, export and loading.

        Names and shapes of the tensors are the checkpoint's (`logical_tensors`). Views alias the parameters, so after `step`
        they hold the new weights. `make_optimizer` may move the parameters and invalidates earlier views; later ones stay valid.
        """

    # ---- microbatches

    @abstractmethod
    def pack(
        self, tokens_BT: Tensor, contexts: RowContexts, wanted_BT: Tensor, segments: Sequence[Segment] = ()
    ) -> Packed:
        """Right-padded rows -> one packed microbatch for this rank, padded and split over context-parallel ranks as the backend needs.

        Args:
            tokens_BT: int64, on the host.
            contexts: of these rows; each is computed by itself.
            wanted_BT: bool, the tokens whose log-probability or value is wanted; readouts are 0 at the others.
            segments: common prefixes and the rest of each context, if `shares_prefixes`; empty: each context is a segment.
        """

    @abstractmethod
    def microbatch_count(self, needed: int) -> int | None:
        """Number of microbatches that this data shard must run if its rows need at least `needed`; None: any number.

        A number is returned where ranks wait for each other's microbatches (pipeline stages; expert-parallel or fully sharded
        data-parallel ranks, which communicate within each microbatch): it is equal on those ranks, at least `needed`, and the
        microbatches should have nearly equal cost. A shard with fewer groups of rows adds empty microbatches, whose loss is 0.
        Collective over the ranks that must agree.
        """

    @abstractmethod
    def computed_tokens(self, batch: Packed) -> int:
        """Tokens that the backend computes for a microbatch, including padding: for the metric `padding`."""

    # ---- computation

    @abstractmethod
    def forward(self, batches: Sequence[Packed]) -> list[Tensor]:
        """The first readout of each microbatch, in evaluation mode and without gradients.

        Collective over the role's ranks.

        Returns:
            For each microbatch [B] or [B, T] float32 on the model's device, the same on every rank of a data shard.
        """

    @abstractmethod
    def backward(self, batches: Sequence[Packed], loss: MicrobatchLoss) -> None:
        """Forward and backward of every microbatch, in training mode: gradients of the sum of `loss` over the microbatches.

        Gradients of an earlier call are zeroed first. Afterwards they are float32 and fully reduced: summed, not averaged, over
        data shards and context-parallel ranks, since the loss is already divided by the denominators of the global batch.
        `loss` gets readouts of complete rows (joined over context-parallel ranks), and every output rank of a data shard
        computes the same loss. Needs `make_optimizer`. Collective over the role's ranks.
        """

    @abstractmethod
    def grad_norm(self) -> float:
        """L2 norm of the gradients of the whole model, before clipping; each parameter counts once, however many ranks hold it.

        Neither weights nor optimizer state change, so the step can still be skipped. Call it once after each `backward`. Returns
        the same value on every rank; NaN or infinity if a gradient is. Collective over the role's ranks.
        """

    @abstractmethod
    def step(self, lr: float, norm: float) -> None:
        """One AdamW step (Loshchilov & Hutter 2019) at learning rate `lr`, with the hyperparameters of `config.optimizer`.

        Gradients are first scaled by clip_grad / (norm + 1e-6) if that is below 1 and clip_grad is above 0. One-dimensional
        parameters have no weight decay. Collective over the role's ranks.

        Args:
            norm: the result of `grad_norm`.
        """

    # ---- reductions

    @abstractmethod
    def all_reduce_data(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce a tensor on the host over the data shards, in place, and return it. Collective over the ranks with the same
        other coordinates in each shard."""

    @abstractmethod
    def broadcast_output(self, value: Tensor) -> Tensor:
        """Broadcast a tensor, on the host or the device, in place from the last pipeline stage, and return it. Collective over the
        ranks of a pipeline; a no-op without one."""

    # ---- optimizer

    @abstractmethod
    def make_optimizer(self) -> None:
        """Allocate gradient buffers and optimizer state, unless they exist. Collective over the role's ranks.

        Float32 masters start as copies of the weights; the caller overwrites them if the checkpoint has higher precision.
        """

    @abstractmethod
    def optimizer_slices(self) -> Sequence[OptimizerSlice]:
        """This rank's optimizer state, as ranges of the storages of `weights`. Together the ranks cover every element of every
        parameter. Needs `make_optimizer`."""

    @abstractmethod
    def saves(self, piece: Piece) -> bool:
        """Whether this rank writes its optimizer state for a piece of its `weights` to checkpoints.

        Exactly one of the ranks that hold the same range does; computed without communication.
        """

    @abstractmethod
    def reset_moments(self, steps: int) -> None:
        """Set AdamW's step count to `steps` and its moments to zero; a checkpoint's moments are then written into them through
        `optimizer_slices`. With `steps` = 0 there are no moments."""

    # ---- memory

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """This rank's memory as offloadable parts: `weights`, `gradients` and `optimizer`; new objects at each call.

        The last two are empty before `make_optimizer`. Offloading keeps the tensors' identity: views stay valid.
        """

    # ---- random states

    @classmethod
    @abstractmethod
    def random_states(cls) -> dict[str, Tensor]:
        """States of the backend's random number generators in this process, besides torch's own: uint8 tensors by name."""

    @classmethod
    @abstractmethod
    def set_random_states(cls, states: Mapping[str, Tensor]) -> None:
        """Restore the result of `random_states`; generators that are not named keep their state."""
