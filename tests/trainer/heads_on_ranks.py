"""What ranks do in the scalar heads' tests: a critic and a reward model on Megatron beside transformers' classification model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from aligner.data.samples import Samples
from aligner.models.spec import with_scalar_head
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.world import World
from aligner.trainer.config import CriticConfig, OptimizerConfig, RewardModelConfig
from aligner.trainer.critic import Critic
from aligner.trainer.reward_model import RewardModel
from tests.trainer.parity_on_ranks import (
    ADAM,
    LENGTH_B,
    LENGTHS,
    MASK_BT,
    PLACE_T,
    PROMPT,
    TOKENS_BT,
    Case,
    adam,
    checkpoint_form,
    gradients_off,
    stored,
)

R = TypeVar("R", Critic, RewardModel)
ROWS = len(LENGTHS)
LEFT_OUT = torch.tensor([False] * 4 + [True] * 2 + [False] * 2)
"""The third pair: its masks are cleared."""
TRAINED_BT = MASK_BT & ~LEFT_OUT[:, None]
RETURN_BT = torch.randn(TOKENS_BT.shape, generator=torch.Generator().manual_seed(5))
PREFERENCE_B = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0])
FREE = OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=False)
BATCH = Samples(
    TOKENS_BT,
    torch.full((ROWS,), PROMPT),
    LENGTH_B,
    TRAINED_BT,
    torch.arange(ROWS) // 2,
    [{"row": i} for i in range(ROWS)],
)


def squared(value_BT: Tensor, *, mask_BT: Tensor, return_BT: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    error_BT = torch.where(mask_BT, value_BT - return_BT, 0.0)
    return weight * error_BT.square(), {"error": error_BT.abs(), "widest": error_BT.abs().amax(1)}


def bradley_terry(score_B: Tensor, *, mask_BT: Tensor, preference_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert len(score_B) % 2 == 0, "a pair was split"
    margin_P = (score_B * preference_B).view(-1, 2).sum(1)
    loss_B = -F.logsigmoid(margin_P).repeat_interleave(2)
    return loss_B, {"accuracy": (margin_P > 0).float().repeat_interleave(2), "kl": score_B.detach()}


bradley_terry.rows_together = 2  # type: ignore[attr-defined]


@dataclass
class Reference:
    """Transformers' model and both losses of the whole batch, written out."""

    model: PreTrainedModel
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def numbers_BT(self) -> Tensor:
        """The head's output at every token."""
        inside = (LENGTH_B[:, None] > PLACE_T).long()
        return self.model.score(self.model.model(TOKENS_BT, attention_mask=inside).last_hidden_state)[..., 0]

    def values_BT(self) -> Tensor:
        return F.pad(self.numbers_BT()[:, :-1], (1, 0))

    def scores_B(self) -> Tensor:
        inside = (LENGTH_B[:, None] > PLACE_T).long()
        return self.model(TOKENS_BT, attention_mask=inside).logits[:, 0]

    def value_loss(self) -> Tensor:
        return 0.5 * (self.values_BT() - RETURN_BT)[TRAINED_BT].square().mean()

    def preference_loss(self) -> Tensor:
        s = self.scores_B()
        return -(F.logsigmoid(s[0] - s[1]) + F.logsigmoid(s[3] - s[2]) + F.logsigmoid(s[6] - s[7])) / 3


def norms_in_float64(model: PreTrainedModel) -> None:
    """Transformers' RMSNorm computes in float32 in a model of float64 too."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            module.forward = functools.partial(rms_norm, module, eps, float(kind.startswith("Gemma")))


def rms_norm(module: nn.Module, eps: float, beside: float, x: Tensor) -> Tensor:
    """Zhang & Sennrich 2019; Gemma's multiplies by 1 + weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (beside + module.weight)


def take_gradients(case: Case, expected: Reference, loss: Tensor) -> float:
    """Gradients of `loss` under the checkpoint's names; their norm."""
    expected.model.zero_grad()
    loss.backward()
    expected.gradients = dict(checkpoint_form(case.spec, expected.model, "grad"))
    return torch.cat([grad.flatten() for grad in expected.gradients.values()]).double().norm().item()


def role(case: Case, kind: type[R], world: World, optimizer: OptimizerConfig) -> R:
    settings = CriticConfig if kind is Critic else RewardModelConfig
    config = settings(micro_tokens=case.micro_tokens, recompute=case.recompute, optimizer=optimizer)
    mesh = Mesh(tuple(range(world.size)), name=kind.section, **case.sizes)
    name, spec = f"{case.text} {kind.section} {optimizer.lr}", with_scalar_head(case.spec)
    return kind(name, world, mesh, spec, config, sequence_parallel=case.sequence_parallel)


def field_of(model: Critic | RewardModel, ref: Ref, value: Tensor) -> Ref:
    """A value per row of the whole batch, lined up with `ref`."""
    return model.map(lambda s: value[[f["row"] for f in s.fields]], ref)


def critic_update(critic: Critic, ref: Ref) -> dict[str, float]:
    targets = critic.map(lambda s: RETURN_BT[[f["row"] for f in s.fields]][:, : s.tokens_BT.shape[1]], ref)
    return critic.update(functools.partial(squared, weight=0.5), ref, return_BT=targets).gather()  # type: ignore[no-any-return]


def same(got: float, wanted: float, what: Any) -> None:
    assert abs(got - wanted) < 1e-5 * max(1.0, abs(wanted)), (what, got, wanted)


def check_critic(case: Case, world: World, expected: Reference) -> tuple[float, float]:
    critic = role(case, Critic, world, FREE)
    ref = critic.scatter(BATCH, 2)
    wanted_BT = torch.where(TRAINED_BT, expected.values_BT().detach(), 0.0)
    of_values = (critic.values(ref).gather() - wanted_BT).abs().max().item()
    assert of_values < 1e-5, (case.text, of_values)
    loss = expected.value_loss()
    norm, row = take_gradients(case, expected, loss), critic_update(critic, ref)
    of_gradients = gradients_off(critic, expected)
    assert of_gradients < 1e-5, (case.text, of_gradients)
    same(row["loss"], loss.item(), "value loss")
    same(row["grad_norm"], norm, "value gradient")
    error_BT = torch.where(TRAINED_BT, (wanted_BT - RETURN_BT).abs(), 0.0)
    same(row["error"], error_BT[TRAINED_BT].mean().item(), "a mean over tokens")
    same(row["widest"], error_BT.amax(1)[~LEFT_OUT].mean().item(), "a mean over rows")
    return of_values, of_gradients


def check_reward_model(case: Case, world: World, expected: Reference) -> tuple[float, float]:
    model = role(case, RewardModel, world, FREE)
    ref = model.scatter(BATCH, 2)
    wanted_B = expected.scores_B()
    of_scores = (model.scores(ref).gather() - wanted_B).abs().max().item()
    assert of_scores < 1e-5, (case.text, of_scores)
    assert not model.has_optimizer and not model.version, "asking for scores made an optimizer"
    loss = expected.preference_loss()
    norm = take_gradients(case, expected, loss)
    preference = field_of(model, ref, PREFERENCE_B)
    row = model.update(bradley_terry, ref, preference_B=preference).gather()
    of_gradients = gradients_off(model, expected)
    assert of_gradients < 1e-5, (case.text, of_gradients)
    same(row["loss"], loss.item(), "preference loss")
    same(row["grad_norm"], norm, "preference gradient")
    same(row["kl_max"], wanted_B[~LEFT_OUT].max().item(), "a maximum over rows")
    assert row["tokens"] == TRAINED_BT.sum() and model.version == 1
    return of_scores, of_gradients


def check_exports(case: Case, world: World, expected: Reference, out: Path) -> None:
    """What a folder of transformers becomes, untouched and after a step of the distributed optimizer."""
    model = role(case, RewardModel, world, ADAM)
    model.save_checkpoint(out / "same")
    if world.rank == 0:
        old, new = stored(case.folder), stored(out / "same")
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old), case.text
    ref = model.scatter(BATCH, 2)
    model.update(bradley_terry, ref, preference_B=field_of(model, ref, PREFERENCE_B))
    model.save_checkpoint(out / "trained")
    if world.rank == 0:
        adam(expected.model)
        new = stored(out / "trained")
        for name, value in checkpoint_form(case.spec, expected.model, "data"):
            off = (new[name] - value).abs().max().item()
            assert off < 1e-5 * max(1.0, value.abs().max().item()), (case.text, name, off)
        back = AutoModelForSequenceClassification.from_pretrained(out / "trained", dtype=torch.float32).eval()
        assert back.num_labels == 1 and back.config.pad_token_id == 0
        off = (Reference(back).scores_B() - expected.scores_B()).abs().max().item()
        assert off < 1e-4, (case.text, off)


def check_refusal(case: Case, world: World) -> None:
    model = role(case, RewardModel, world, replace(FREE, lr=1.0))
    ref = model.scatter(BATCH)
    with pytest.raises(ValueError, match="groups of 2 consecutive rows, and the batch has groups of 1"):
        model.update(bradley_terry, ref, preference_B=field_of(model, ref, PREFERENCE_B))


def check_heads(world: World, folder: Path, out: Path, text: str) -> None:
    """`text`: a case as in parity_on_ranks.py, of the checkpoints in `folder`."""
    case = Case(text, folder)
    # in float64: the smallest gradients are sums of large terms, of which float32 leaves transformers 1e-5 too
    model = AutoModelForSequenceClassification.from_pretrained(
        case.folder, dtype=torch.float64, experts_implementation="eager"
    )
    norms_in_float64(model)
    expected = Reference(model.eval())
    check_critic(case, world, expected)
    check_reward_model(case, world, expected)
    if case.adam:
        check_exports(case, world, expected, out / text)
        check_refusal(case, world)
