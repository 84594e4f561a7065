"""`TrainEngine`: what a training backend is. One model of one role, sharded over the role's ranks, behind neutral code.

Roles, the update, packing, losses, metrics and checkpoints are written against this class alone; a backend (Megatron-core in
`trainer/megatron/`) implements it and is entered in `trainer/engines.py`.

Terms. A *data shard* is one replica's share of a batch: the ranks of a shard get the same rows. *Collective* says which ranks
must enter a method together. *Output ranks* are those that compute the head's output and so the loss (the last pipeline stage;
every rank without pipeline parallelism).

Determinism: for given weights, batches and layout, every method gives the same bits every time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch.distributed as dist
from torch import Tensor

from aligner.reshard.plan.region import Piece
from aligner.trainer.packing import Packed
from aligner.trainer.readout import Readout

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.reshard.weights import ShardedWeights
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part
    from aligner.spmd.world import World
    from aligner.trainer.config import TrainingConfig

MicrobatchLoss = Callable[[int, dict[str, Tensor]], Tensor]
"""(number of the microbatch, its readout by name) -> scalar: what it adds to the loss of the global batch. Called once for each
microbatch, in the order of the batches, on output ranks only; the readouts carry gradients in `backward`."""

MASTER, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
"""Names in a checkpoint: the float32 weights and AdamW's two moments."""


@dataclass(frozen=True)
class OptimizerSlice:
    """A flat range of one parameter whose optimizer state this rank holds."""

    storage: str
    """The parameter, as the pieces of `TrainEngine.weights` name it."""
    start: int
    """First element of the range, counted over the flattened storage."""
    stop: int
    """One past the last."""
    master: Tensor
    """[stop - start] float32, writable: the weights that the optimizer steps on. Of a float32 model it may be the parameter itself."""
    moments: dict[str, Tensor]
    """MOMENTS by name, each like `master`; empty before the first step."""


class TrainEngine(ABC):
    """A model that runs packed microbatches and, once it has an optimizer, learns.

    Life: `build` (weights undefined) -> the caller writes every piece of `weights` -> `forward` any number of times ->
    `make_optimizer` -> rounds of `backward`, `grad_norm`, and `step` or not. `forward` may come between any two of them.

    `forward` and `backward` call `world.activity.tick()` at each microbatch: a rank that makes no progress is taken for hung.
    """

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
    ) -> Self | None:
        """Build this rank's shard of the model; the values of its weights are not defined yet.

        Collective over the world, because process groups are made here: every rank calls it with equal arguments.

        Args:
            mesh: the role's ranks and parallel sizes.
            readout: what output ranks make of the head's output.
            sequence_parallel: split activations along the sequence between tensor-parallel ranks.

        Returns:
            The engine, or None on ranks outside `mesh`.

        Raises:
            ValueError: the backend cannot run this model under this mesh (see `Backend.check`, which says so before a start).
        """

    @property
    @abstractmethod
    def weights(self) -> ShardedWeights:
        """The model's weights as regions of checkpoint tensors: what a weight sync, an export and a load work on.

        Names and shapes of the tensors are the checkpoint's (`logical_tensors`). Views alias the parameters: they are valid
        until `make_optimizer`, which may move the parameters, and afterwards for good. After `step` they hold the new weights.
        """

    # ---- microbatches

    @abstractmethod
    def pack(self, tokens_BT: Tensor, length_B: Tensor, wanted_BT: Tensor) -> Packed:
        """Right-padded rows -> one microbatch as this rank runs it: padded and cut over context-parallel ranks as the backend needs.

        Args:
            tokens_BT: int64 on the host.
            length_B: int64, tokens of each row.
            wanted_BT: bool, the tokens whose log-probability or value is wanted; readouts are 0 at the others.
        """

    @abstractmethod
    def microbatch_count(self, wanted: int) -> int | None:
        """Number of microbatches this data shard must run where its rows need at least `wanted`; None: as many as it likes.

        A number is given where ranks wait for each other's microbatches (pipeline stages; expert-parallel or fully sharded
        data ranks, which communicate within each one): it is then equal on them, at least `wanted`, and the microbatches
        should be of nearly equal cost. Collective over the ranks that it must agree on. What a shard lacks it fills with
        microbatches without rows, whose loss is 0.
        """

    @abstractmethod
    def computed_tokens(self, batch: Packed) -> int:
        """Tokens that the backend computes for a microbatch, its padding included: for the metric `padding`."""

    # ---- computation

    @abstractmethod
    def forward(self, batches: Sequence[Packed]) -> list[Tensor]:
        """The first readout of each microbatch, without gradients and in evaluation mode.

        Collective over the role's ranks.

        Returns:
            [B] or [B, T] float32 on the model's device by microbatch, the same on every rank of a data shard.
        """

    @abstractmethod
    def backward(self, batches: Sequence[Packed], loss: MicrobatchLoss) -> None:
        """Forward and backward of every microbatch, in training mode: gradients of the sum of what `loss` returns.

        Gradients of an earlier call are dropped first. At the end they are float32, complete and reduced: summed, never
        averaged, over data shards and context ranks, since the loss's weights hold the denominators of the global batch.
        The readouts that `loss` gets are whole (context ranks' parts are joined), and each output rank of a data shard
        computes the same loss. Needs `make_optimizer`. Collective over the role's ranks.
        """

    @abstractmethod
    def grad_norm(self) -> float:
        """L2 norm of the gradients of the whole model, before clipping; each parameter counts once whoever holds copies.

        Neither weights nor optimizer state change, so that a step can still be left out. Call it once after each `backward`. The
        same value on every rank; NaN or infinity where a gradient is. Collective over the role's ranks.
        """

    @abstractmethod
    def step(self, lr: float, norm: float) -> None:
        """One AdamW step (Loshchilov & Hutter 2019) at learning rate `lr`, as `config.optimizer` says.

        Gradients are scaled by clip_grad / (norm + 1e-6) first where that is below 1 and clip_grad is above 0. Parameters
        of one dimension do not decay. Collective over the role's ranks.

        Args:
            norm: what `grad_norm` returned.
        """

    # ---- reductions

    @abstractmethod
    def all_reduce_data(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor on the host over the data shards, in place, and return it. Collective over the ranks at the same place
        in each shard."""

    @abstractmethod
    def broadcast_output(self, value: Tensor) -> Tensor:
        """Overwrite a tensor, on the host or the device, by what its shard's output rank has, and return it. Collective over the
        ranks of a pipeline; nothing happens without one."""

    # ---- optimizer

    @abstractmethod
    def make_optimizer(self) -> None:
        """Make gradient buffers and optimizer state; nothing where they exist. Collective over the role's ranks.

        Float32 masters start as copies of the weights; the caller overwrites them where the checkpoint has more digits.
        """

    @abstractmethod
    def optimizer_slices(self) -> Sequence[OptimizerSlice]:
        """Everything that this rank's optimizer holds, as ranges of the storages of `weights`. Together the ranks cover every
        element of every parameter. Needs `make_optimizer`."""

    @abstractmethod
    def saves(self, piece: Piece) -> bool:
        """Whether this rank writes its optimizer state of a piece of its `weights` to checkpoints.

        Of the ranks that hold the same range of it exactly one does, by arithmetic.
        """

    @abstractmethod
    def reset_moments(self, steps: int) -> None:
        """AdamW's state as after `steps` steps, with moments of zero: what a checkpoint's moments are then written into, by
        `optimizer_slices`. With `steps` = 0 there is none."""

    # ---- memory

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """What this rank holds: `weights`, `gradients` and `optimizer`, new objects at each call.

        The last two hold nothing before `make_optimizer`. Parts leave and come back under the same tensors: views stay valid.
        """

    # ---- random states

    @classmethod
    @abstractmethod
    def random_states(cls) -> dict[str, Tensor]:
        """The backend's random number generators of this process besides torch's own, as uint8 tensors by name; for checkpoints."""

    @classmethod
    @abstractmethod
    def set_random_states(cls, states: Mapping[str, Tensor]) -> None:
        """Back to what `random_states` returned; generators that it does not name are left alone."""
