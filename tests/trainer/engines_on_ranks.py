"""What a rank does in the test of training backends: the same roles on Megatron-core and on `PlainEngine`, side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from aligner.data.samples import Samples, pad_rows
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.models.stored import Entry
from aligner.objective.losses import clipped_surrogate, negative_log_likelihood
from aligner.objective.values import clipped_value_loss
from aligner.reshard.message.storage import strided_view
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.world import World
from aligner.trainer import engines
from aligner.trainer.config import CriticConfig, OptimizerConfig, PolicyConfig, RewardModelConfig
from aligner.trainer.critic import Critic
from aligner.trainer.policy import Policy
from aligner.trainer.reward_model import RewardModel
from aligner.trainer.trainable_role import TrainableRole
from tests.trainer.plain_engine import PLAIN, PlainEngine

LENGTHS, PROMPT, UPDATES = [9, 17, 12, 5, 16, 16, 7, 21], 3, 3
GENERATOR = torch.Generator().manual_seed(3)
LENGTH_B = torch.tensor(LENGTHS)
TOKENS_BT = pad_rows([torch.randint(3, 60, (n,), generator=GENERATOR).tolist() for n in LENGTHS], torch.long)
PLACE_T = torch.arange(TOKENS_BT.shape[1])
MASK_BT = (PLACE_T >= PROMPT) & (LENGTH_B[:, None] > PLACE_T)
ROLLOUT_BT = torch.where(MASK_BT, -4.0 + 0.5 * torch.randn(MASK_BT.shape, generator=GENERATOR), 0.0)
TARGET_BT = torch.randn(MASK_BT.shape, generator=GENERATOR)
ADVANTAGE_B = torch.randn(len(LENGTHS), generator=GENERATOR)
# an epsilon that keeps Adam's first step from being the gradient's sign, which rounding turns where it is small
OPTIMIZER = OptimizerConfig(lr=3e-3, eps=1e-2, weight_decay=0.1, clip_grad=0.5, schedule="linear", warmup_steps=2)
COMMON: dict[str, Any] = {"micro_tokens": 40, "minibatches": 2, "optimizer": OPTIMIZER}


def to_five(score_B: Tensor) -> Any:
    """A target that no update comes near: the gradient is not a difference of equal numbers."""
    return (score_B - 5).square(), {"score": score_B}


def fields(role: TrainableRole, samples: Ref, **values: Tensor) -> dict[str, Ref]:
    return {name: role.scatter_like(samples, value) for name, value in values.items()}


GRPO = functools.partial(clipped_surrogate, clip_low=0.2, clip_high=0.28, kl_coef=0.05, entropy_coef=0.01)
VALUE = functools.partial(clipped_value_loss, clip=0.2)
GRPO_FIELDS = {"advantage_B": ADVANTAGE_B, "reference_logp_BT": ROLLOUT_BT.flip(0)}
VALUE_FIELDS = {"rollout_value_BT": TARGET_BT / 3, "return_BT": TARGET_BT}
CASES: dict[str, tuple[type[TrainableRole], Any, str, Any, dict[str, Tensor]]] = {
    "sft": (Policy, PolicyConfig(**COMMON), "logprobs", negative_log_likelihood, {}),
    "grpo": (Policy, PolicyConfig(**COMMON, reduction="sequence_mean", epochs=2), "logprobs", GRPO, GRPO_FIELDS),
    "critic": (Critic, CriticConfig(**COMMON), "values", VALUE, VALUE_FIELDS),
    "reward_model": (RewardModel, RewardModelConfig(**COMMON), "scores", to_five, {}),
}


class Memory:
    """What `save_state` of one role returned on every rank, as a checkpoint that is open for a role of any name."""

    def __init__(self, world: World, tensors: dict[str, Tensor], entries: dict[str, Any]) -> None:
        self.saved: list[Any] = [None] * world.size
        dist.all_gather_object(self.saved, (tensors, entries))

    def entries(self, key: str) -> Iterator[tuple[int, Entry]]:
        for rank, (_, entries) in enumerate(self.saved):
            for name in entries:
                if name.endswith(key[key.rindex("/") :]):
                    yield from ((rank, entry) for entry in entries[name])

    def tensor(self, rank: int, name: str) -> Tensor:
        return self.saved[rank][0][name]  # type: ignore[no-any-return]


def gap(one: Any, other: Any) -> float:
    a, b = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


def gradient_of(role: Any, name: str) -> Tensor:
    """The whole gradient of a checkpoint's tensor, on one rank."""
    if isinstance(role.engine, PlainEngine):
        return role.engine.parameters[name].grad
    piece = next(piece for piece in role.weights.pieces() if piece.name == name)
    return strided_view(role.engine.optimizer.gradients()[piece.storage], piece)


def gradients_gap(megatron: Any, plain: Any) -> float:
    """Relative to the largest gradient of each tensor; on one rank."""
    worst = 0.0
    if megatron.mesh.size > 1:
        return worst
    for piece in megatron.weights.pieces():
        flat = megatron.engine.model.parameters[piece.storage].main_grad.view(-1)
        mine = flat.as_strided(piece.size, piece.stride, flat.storage_offset() + piece.offset)
        whole = gradient_of(plain, piece.name)
        box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
        worst = max(worst, ((mine - whole[box]).abs().max() / whole.abs().max().clamp(min=1e-3)).item())
    return worst


def exported_gap(one: TrainableRole, other: TrainableRole, folder: Path) -> float:
    weights: list[dict[str, Tensor]] = []
    for role in (one, other):
        role.save_checkpoint(folder / role.name)
        dist.barrier()  # for ranks that are not the role's
        files = sorted((folder / role.name).glob("*.safetensors"))
        weights.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    left, right = weights
    assert left.keys() == right.keys()
    return max(gap(left[name], right[name]) for name in left)


def compare(
    world: World, model: Path, case: str, out: Path, other: str = "plain", replicas: int = 1, changes: Any = None
) -> dict[str, float]:
    """The largest differences of Megatron and another backend, relative to the largest value where that is above 1.

    Three updates of two optimizer steps and more; then Megatron goes on from what the other backend saved, and the other from
    what Megatron saved.

    Args:
        replicas: of the other backend's mesh.
        changes: settings of both.
    """
    engines.BACKENDS["plain"] = PLAIN  # type: ignore[index]
    kind, config, method, loss, values = CASES[case]
    config = replace(config, **(changes or {}))
    spec = read_spec(model) if kind is Policy else with_scalar_head(read_spec(model))
    samples = Samples(
        TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8) // 2, [{}] * 8, ROLLOUT_BT
    )

    def build(engine: str, name: str) -> TrainableRole:
        copies = 1 if engine == "megatron" else replicas
        mesh = Mesh(tuple(range(world.size)), name="policy", replicas=copies)
        return kind(name, world, mesh, spec, replace(config, engine=engine), total_steps=20, max_response=20)

    def update(role: TrainableRole) -> dict[str, float]:
        placed = role.scatter(samples, group_size=2)
        return role.update(loss, placed, **fields(role, placed, **values)).gather()  # type: ignore[no-any-return]

    def read(role: TrainableRole) -> Tensor:
        return getattr(role, method)(role.scatter(samples)).gather()  # type: ignore[no-any-return]

    megatron, plain = (build(engine, f"{model.name} {case} {engine}") for engine in ("megatron", other))
    if spec.stored_head is not spec.head:  # a new head is zero, and so are all gradients but its own
        start_head(megatron, plain)
    worst = {"readout": gap(read(megatron), read(plain)), "metrics": 0.0, "gradients": 0.0}
    for _ in range(UPDATES):
        rows = [update(role) for role in (megatron, plain)]
        assert rows[0].keys() == rows[1].keys() and {"loss", "grad_norm", "lr"} <= rows[0].keys()
        different = {name: gap(rows[0][name], rows[1][name]) for name in rows[0] if name != "padding"}
        worst["metrics"] = max(worst["metrics"], *different.values())
        worst["gradients"] = max(worst["gradients"], gradients_gap(megatron, plain))
    worst["weights"] = exported_gap(megatron, plain, out / case)
    leave_and_return(plain)
    pairs = [("megatron", plain), *([(other, megatron)] if other != "plain" else [])]
    for heir, saving in pairs:
        known, *saved = saving.save_state()
        taken_over = build(heir, f"{model.name} {case} {heir} taken over")
        taken_over.load_state(known, Memory(world, *saved))
        rows = [update(role) for role in (taken_over, saving)]
        worst[f"{heir} takes over"] = max(gap(rows[0][name], rows[1][name]) for name in rows[0] if name != "padding")
        worst[f"{heir} takes over, weights"] = exported_gap(taken_over, saving, out / f"{case}_taken_over_{heir}")
    return worst


def start_head(*roles: TrainableRole) -> None:
    for role in roles:
        for piece in role.weights.pieces():
            if piece.name == "score.weight":
                role.weights.view(piece).copy_(torch.linspace(-0.3, 0.3, piece.size[1]))


def leave_and_return(role: TrainableRole) -> None:
    parts: dict[str, Any] = dict(role.engine.parts())
    before = [value.clone() for value in map(role.weights.view, role.weights.pieces())]
    for act in (lambda part: part.evict(), lambda part: part.bring()):
        for part in parts.values():
            act(part)
    assert all(torch.equal(a, role.weights.view(b)) for a, b in zip(before, role.weights.pieces(), strict=True))
