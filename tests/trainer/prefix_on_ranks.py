"""What ranks do in the tests of prefix sharing: a step on Megatron, its rows sharing what they begin with, beside transformers'
model, which computes each row by itself in float64.

A case is a text such as "llama:tensor=2,sp,micro=80". Prompts are trained too, so that shared tokens have losses in each row.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from aligner.data.samples import Samples, pad_rows
from aligner.models.spec import with_scalar_head
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import CriticConfig, OptimizerConfig, PolicyConfig, RewardModelConfig
from aligner.trainer.critic import Critic
from aligner.trainer.policy import Policy
from aligner.trainer.reward_model import RewardModel
from tests.trainer.heads_on_ranks import Reference as HeadReference
from tests.trainer.heads_on_ranks import norms_in_float64
from tests.trainer.parity_on_ranks import VOCAB, Case, checkpoint_form, gradients_off
from tests.trainer.short_rows_on_ranks import likelihood, reference

FREE = OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=False)


def rows() -> list[list[int]]:
    """Samples of two prompts; among them a row twice, a row that ends where others go on, and a beginning of a beginning."""
    generator = torch.Generator().manual_seed(5)

    def some(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    prompt, other, more = some(20), some(9), some(6)
    return [
        prompt + some(5),
        other + some(3),
        prompt,
        prompt + more + some(4),
        some(7),
        prompt + more + some(9),
        other + some(12),
        prompt + more + some(1),
        other + more,
        other + more,
        [3],
        other[:5] + some(2),
    ]


def batch() -> Samples:
    all_rows = rows()
    count = len(all_rows)
    tokens_BT = pad_rows(all_rows, torch.long)
    length_B, place_T = torch.tensor([len(row) for row in all_rows]), torch.arange(tokens_BT.shape[1])
    mask_BT = (place_T >= 1) & (length_B[:, None] > place_T)
    return Samples(tokens_BT, torch.ones(count, dtype=torch.long), length_B, mask_BT, torch.arange(count), [{}] * count)


def check_shared(world: World, folder: Path, text: str) -> None:
    case = Case(text, folder)
    samples = batch()
    expected = reference(case, samples)
    mesh = Mesh(tuple(range(world.size)), name="policy", **case.sizes)
    config = PolicyConfig(
        micro_tokens=case.micro_tokens,
        recompute=case.recompute,
        share_prefix=case.share_prefix,
        optimizer=FREE,
    )
    policy = Policy(text, world, mesh, case.spec, config, sequence_parallel=case.sequence_parallel)
    ref = policy.scatter(samples)
    off = (policy.logprobs(ref).gather() - expected.logp_BT).abs().max().item()
    assert off < 1e-5, (text, off)
    row = policy.update(likelihood, ref).gather()
    assert (row["shared_prefix"] > 0.2) == (case.share_prefix != "off"), row
    assert abs(row["loss"] - expected.loss) < 1e-5 * max(1, abs(expected.loss)), (text, row["loss"], expected.loss)
    of_gradients = gradients_off(policy, expected)
    assert of_gradients < 1e-5, (text, of_gradients)
    norm = torch.cat([grad.flatten() for grad in expected.gradients.values()]).double().norm().item()
    assert abs(row["grad_norm"] - norm) < 1e-5 * norm, (text, row["grad_norm"], norm)


def squared(value: torch.Tensor, *, mask_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of values per token and of scores per row."""
    return (torch.where(mask_BT, value, 0.0) if value.dim() == 2 else value).square(), {}


def check_heads(world: World, folder: Path, text: str) -> None:
    """Values at shared tokens belong to each row; a score is read at a row's own last token."""
    case, samples = Case(text, folder), batch()
    model = AutoModelForSequenceClassification.from_pretrained(case.folder, dtype=torch.float64).eval()
    norms_in_float64(model)
    count_B = samples.length_B.tolist()
    numbers = [
        model.score(model.model(row[None, :length]).last_hidden_state)[0, :, 0]
        for row, length in zip(samples.tokens_BT, count_B, strict=True)
    ]
    values = torch.cat([number[:-1] for number in numbers])
    scores = torch.stack([number[-1] for number in numbers])
    trained_B = samples.mask_BT.any(1)
    mesh = Mesh(tuple(range(world.size)), name="critic", **case.sizes)
    settings = {"micro_tokens": case.micro_tokens, "share_prefix": case.share_prefix, "optimizer": FREE}
    for role, config, method, loss in (
        (Critic, CriticConfig(**settings), "values", values.square().mean()),
        (RewardModel, RewardModelConfig(**settings), "scores", scores[trained_B].square().mean()),
    ):
        made = role(f"{text} {method}", world, mesh, with_scalar_head(case.spec), config)
        ref = made.scatter(samples)
        got = getattr(made, method)(ref).gather()
        expected = values if got.dim() == 2 else scores
        off = ((got[samples.mask_BT] if got.dim() == 2 else got) - expected.detach()).abs().max().item()
        assert off < 1e-5, (text, method, off)
        row = made.update(squared, ref).gather()
        assert row["shared_prefix"] > 0.2
        model.zero_grad()
        loss.backward(retain_graph=True)
        reference_of = HeadReference(model, dict(checkpoint_form(case.spec, model, "grad")))
        of_gradients = gradients_off(made, reference_of)
        assert of_gradients < 1e-5, (text, method, of_gradients)
