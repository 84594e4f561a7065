"""A training backend of a hundred lines: one process, transformers' own classes, torch's AdamW. It shows what `TrainEngine` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import logical_tensors, parameter_count
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.layout import ExplicitLayout
from aligner.reshard.plan.region import Piece, whole_tensor
from aligner.spmd.mesh import Mesh
from aligner.spmd.residency import Part
from aligner.spmd.world import World
from aligner.trainer.config import TrainingConfig
from aligner.trainer.engine import MOMENTS, MicrobatchLoss, OptimizerSlice, TrainEngine
from aligner.trainer.engines import Backend
from aligner.trainer.offload import Offloaded, Scratch
from aligner.trainer.output_layer import PackedOutput
from aligner.trainer.packing import Packed, pack
from aligner.trainer.prefix_tree import Segment
from aligner.trainer.readout import Readout
from aligner.trainer.row_contexts import RowContexts

IMPORT_PATH = "tests.trainer.plain_engine.PlainEngine"


def layout(spec: ModelSpec, mesh: Mesh, dtype: str) -> ExplicitLayout:
    """Every tensor of the checkpoint is a parameter of its own, whole, on the only rank."""
    return ExplicitLayout({0: [whole_tensor(name, shape, dtype) for name, shape in logical_tensors(spec).items()]})


def check(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, sequence_parallel: bool, cpu: bool) -> None:
    """One process, and no experts, which transformers fuses."""
    if mesh.size > 1 or spec.experts:
        raise ValueError("engine=plain runs dense models on one rank")


def bytes_per_rank(spec: ModelSpec, mesh: Mesh, config: TrainingConfig, learns: bool) -> float:
    """Everything is float32."""
    return parameter_count(spec) * (16 if learns else 4)


PLAIN = Backend(check, layout, bytes_per_rank, IMPORT_PATH)


class PlainWeights:
    """Parameters by their names in the checkpoint."""

    def __init__(self, whole: ExplicitLayout, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.layout, self.parameters = whole, parameters

    def pieces(self) -> Sequence[Piece]:
        return self.layout.layout(0)

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self.parameters[piece.storage].data, piece)


class PlainEngine(TrainEngine):
    """float32 on the CPU."""

    def __init__(self, world: World, mesh: Mesh, spec: ModelSpec, config: TrainingConfig, readout: Readout) -> None:
        self.world, self.spec, self.config, self.readout = world, spec, config, readout
        described = AutoConfig.from_pretrained(spec.path)
        described.num_labels = 1
        kind = AutoModelForSequenceClassification if spec.head is Head.SCALAR else AutoModelForCausalLM
        self.model: Any = kind.from_config(described, dtype=torch.float32, attn_implementation="sdpa")
        self.parameters = dict(self.model.named_parameters())
        self.held = PlainWeights(layout(spec, mesh, "float32"), self.parameters)
        self.optimizer: torch.optim.AdamW | None = None

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
        return cls(world, mesh, spec, config, readout) if world.rank in mesh.ranks else None

    @property
    def weights(self) -> PlainWeights:
        return self.held

    def pack(
        self, tokens_BT: Tensor, contexts: RowContexts, wanted_BT: Tensor, segments: Sequence[Segment] = ()
    ) -> Packed:
        assert not segments, "this backend does not share prefixes"
        return pack(tokens_BT, contexts, 1, torch.device("cpu"), wanted_BT=wanted_BT)

    def microbatch_count(self, needed: int) -> int | None:
        return None

    def computed_tokens(self, batch: Packed) -> int:
        return batch.tokens_T.numel()

    def forward(self, batches: Sequence[Packed]) -> list[Tensor]:
        self.model.eval()
        with torch.no_grad():
            return [next(iter(self._read(batch).values())) for batch in batches]

    def backward(self, batches: Sequence[Packed], loss: MicrobatchLoss) -> None:
        assert self.optimizer is not None
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        for number, batch in enumerate(batches):
            loss(number, self._read(batch)).backward()

    def _read(self, batch: Packed) -> dict[str, Tensor]:
        """Rows follow each other in a batch of one; transformers keeps them apart by their positions."""
        self.world.activity.tick()
        given = {"position_ids": batch.positions_T[None], "use_cache": False}
        hidden = self.model.model(batch.tokens_T[None], **given).last_hidden_state[0]
        if self.spec.head is Head.SCALAR:
            return self.readout(PackedOutput(self.model.score(hidden), self.spec.vocab), batch)
        return self.readout(PackedOutput(hidden, self.spec.vocab, self.model.lm_head.weight), batch)

    def grad_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))

    def step(self, lr: float, norm: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.config.optimizer.clip_grad
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, torch.tensor(norm))
        self.optimizer.step()

    def all_reduce_data(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        return value

    def broadcast_output(self, value: Tensor) -> Tensor:
        return value

    def make_optimizer(self) -> None:
        if self.optimizer is not None:
            return
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        adam, named = self.config.optimizer, self.parameters.values()
        groups = [
            {"params": [p for p in named if p.dim() > 1], "weight_decay": adam.weight_decay},
            {"params": [p for p in named if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps)

    def optimizer_slices(self) -> Sequence[OptimizerSlice]:
        assert self.optimizer is not None
        state = self.optimizer.state
        return [
            OptimizerSlice(
                name,
                0,
                parameter.numel(),
                parameter.data.view(-1),
                {moment: state[parameter][moment].view(-1) for moment in MOMENTS if moment in state.get(parameter, {})},
            )
            for name, parameter in self.parameters.items()
        ]

    def saves(self, piece: Piece) -> bool:
        return True

    def reset_moments(self, steps: int) -> None:
        assert self.optimizer is not None
        for parameter in self.parameters.values() if steps else ():
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}

    def parts(self) -> Mapping[str, Part]:
        def gradients() -> list[Tensor]:
            return [p.grad for p in self.parameters.values() if p.grad is not None]

        def state() -> list[Tensor]:
            held = self.optimizer.state.values() if self.optimizer else ()
            return [one[moment] for one in held for moment in MOMENTS]

        return {
            "weights": Offloaded(lambda: [p.data for p in self.parameters.values()], None),
            "gradients": Scratch(gradients),
            "optimizer": Offloaded(state, None),
        }

    @classmethod
    def random_states(cls) -> dict[str, Tensor]:
        return {}

    @classmethod
    def set_random_states(cls, states: Mapping[str, Tensor]) -> None:
        assert not states
