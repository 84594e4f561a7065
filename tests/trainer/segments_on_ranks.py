"""What ranks do in the tests of episodes: roles on several segments a row, beside transformers' model on each segment by itself.

A case is a text such as "llama:share=on,tensor=2,micro=80"; one marked "fsdp" runs on that engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aligner.data.samples import Samples
from aligner.models.spec import with_scalar_head
from aligner.models.transformers_model import held_tensors
from aligner.objective.losses import clipped_surrogate, sequence_clipped_surrogate
from aligner.reshard.message.storage import strided_view
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import CriticConfig, OptimizerConfig, PolicyConfig, RewardModelConfig
from aligner.trainer.critic import Critic
from aligner.trainer.policy import Policy, Reference
from aligner.trainer.reward_model import RewardModel
from tests.trainer.episodes import as_samples, drawn
from tests.trainer.heads_on_ranks import Reference as HeadReference
from tests.trainer.heads_on_ranks import norms_in_float64
from tests.trainer.parity_on_ranks import VOCAB, Case, checkpoint_form, gradients_off
from tests.trainer.prefix_on_ranks import squared

FREE = OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=False)


class EpisodeCase(Case):
    """A model under a layout, on one of the engines."""

    def __init__(self, text: str, folder: Path) -> None:
        self.engine = "fsdp" if ",fsdp" in text else "megatron"
        super().__init__(text.replace(",fsdp", ""), folder)
        self.text = text

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "engine": self.engine, "micro_tokens": self.micro_tokens, "recompute": self.recompute,
            "share_prefix": self.share_prefix, "optimizer": FREE,
        }  # fmt: skip


def segments(samples: Samples) -> Iterator[tuple[int, int, int]]:
    """(row, first token, one past the last) of each segment, token by token."""
    assert samples.segment_BT is not None
    for row, length in enumerate(samples.length_B.tolist()):
        numbers = samples.segment_BT[row, :length].tolist()
        for number in sorted(set(numbers)):
            start = numbers.index(number)
            yield row, start, start + numbers.count(number)


def loss_fields(samples: Samples, logp_BT: Tensor) -> dict[str, Tensor]:
    """An advantage for each token, and log-probabilities of other models, by place: what is swapped shows."""
    noise = 0.3 * torch.randn(2, *logp_BT.shape, generator=torch.Generator().manual_seed(4))
    advantage_BT = torch.randn(logp_BT.shape, generator=torch.Generator().manual_seed(6))
    mask_BT = samples.mask_BT
    return {
        "rollout": torch.where(mask_BT, logp_BT + noise[0], 0.0),
        "reference": torch.where(mask_BT, logp_BT - noise[1], 0.0),
        "advantage": torch.where(mask_BT, advantage_BT, 0.0),
    }


def expected_surrogate(logp: Tensor, given: dict[str, Tensor], mask_BT: Tensor) -> Tensor:
    """DAPO's clip with a k3 term, over all sampled tokens; written out."""
    ratio = (logp - given["rollout"]).exp()
    gain = torch.minimum(ratio * given["advantage"], ratio.clamp(0.8, 1.28) * given["advantage"])
    d = given["reference"] - logp
    return torch.where(mask_BT, -gain + 0.05 * (d.exp() - d - 1), 0.0).sum() / mask_BT.sum()


def expected_sequence(logp: Tensor, given: dict[str, Tensor], mask_BT: Tensor) -> Tensor:
    """GSPO: one ratio for an episode, over the tokens of all of its turns; the mean over episodes."""
    count_B = mask_BT.sum(1)
    ratio_B = ((logp - given["rollout"]) * mask_BT).sum(1).div(count_B).exp()
    advantage_B = given["advantage"][:, 0]
    return -torch.minimum(ratio_B * advantage_B, ratio_B.clamp(0.9, 1.1) * advantage_B).mean()


def close(one: float, other: float, what: object) -> None:
    assert abs(one - other) < 1e-5 * max(1.0, abs(other)), (what, one, other)


def off_fsdp(policy: Any, gradients: dict[str, Tensor]) -> float:
    of_tensor = {
        piece.name: strided_view(gradients[held.storage].float().contiguous(), piece)
        for held in held_tensors(policy.spec)
        if held.trained
        for piece in held.pieces
    }
    worst, computed = 0.0, policy.engine.optimizer.gradients()
    for piece in policy.weights.pieces():
        whole = of_tensor[piece.name]
        box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
        part = strided_view(computed[piece.storage], piece)
        worst = max(worst, ((part - whole[box]).abs().max() / whole.abs().max().clamp(min=1e-3)).item())
    return worst


def check_policy(world: World, folder: Path, text: str) -> None:
    """Log-probabilities of policy and reference, and an update by a token loss and by a sequence loss."""
    case, samples = EpisodeCase(text, folder), as_samples(drawn(11, VOCAB))
    model: Any = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    logp_BT = torch.zeros(samples.tokens_BT.shape, dtype=torch.float64)
    for row, start, stop in segments(samples):
        tokens = samples.tokens_BT[row, start:stop]
        every = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
        logp_BT[row, start + 1 : stop] = every.gather(-1, tokens[1:, None])[:, 0]
    logp_BT = torch.where(samples.mask_BT, logp_BT, 0.0)
    mesh = Mesh(tuple(range(world.size)), name="policy", **case.sizes)
    frozen = Reference(f"{text} reference", world, mesh, case.spec, PolicyConfig(**case.settings))
    off = (frozen.logprobs(frozen.scatter(samples)).gather() - logp_BT).abs().max().item()
    assert off < 1e-5, (text, off)
    given = {name: value.detach() for name, value in loss_fields(samples, logp_BT).items()}
    batch = as_samples(drawn(11, VOCAB), given["rollout"].float())
    token_loss = functools.partial(clipped_surrogate, clip_low=0.2, clip_high=0.28, kl_coef=0.05)
    sequence_loss = functools.partial(sequence_clipped_surrogate, clip_low=0.1, clip_high=0.1)
    for name, loss, reduction, expected in (
        ("token", token_loss, "token_mean", expected_surrogate(logp_BT, given, samples.mask_BT)),
        ("sequence", sequence_loss, "sequence_mean", expected_sequence(logp_BT, given, samples.mask_BT)),
    ):
        model.zero_grad()
        expected.backward(retain_graph=True)
        config = PolicyConfig(**case.settings, reduction=reduction)
        policy = Policy(f"{text} {name}", world, mesh, case.spec, config, sequence_parallel=case.sequence_parallel)
        ref = policy.scatter(batch)
        off = (policy.logprobs(ref).gather() - logp_BT).abs().max().item()
        assert off < 1e-5, (text, name, off)
        if name == "token":
            fields = {"advantage_BT": given["advantage"].float(), "reference_logp_BT": given["reference"].float()}
        else:
            fields = {"advantage_B": given["advantage"][:, 0].float()}
        placed = {key: policy.scatter_like(ref, value) for key, value in fields.items()}
        row = policy.update(loss, ref, **placed).gather()
        close(row["loss"], expected.item(), (text, name))
        assert row["tokens"] == samples.mask_BT.sum()
        assert (row["shared_prefix"] > 0.1) == (case.share_prefix != "off"), (text, row["shared_prefix"])
        if case.engine == "fsdp":
            gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
            of_gradients = off_fsdp(policy, gradients)
        else:
            gradients = dict(checkpoint_form(case.spec, model, "grad"))
            of_gradients = gradients_off(policy, HeadReference(model, gradients))  # type: ignore[arg-type]
        assert of_gradients < 1e-5, (text, name, of_gradients)
        norm = torch.cat([grad.flatten() for grad in gradients.values()]).double().norm().item()
        close(row["grad_norm"], norm, (text, name))


def check_heads(world: World, folder: Path, text: str) -> None:
    """Values in every segment; a score at the end of the last one."""
    case, samples = EpisodeCase(text, folder), as_samples(drawn(12, VOCAB))
    model: Any = AutoModelForSequenceClassification.from_pretrained(case.folder, dtype=torch.float64).eval()
    norms_in_float64(model)
    value_BT = torch.zeros(samples.tokens_BT.shape, dtype=torch.float64)
    scores: dict[int, Tensor] = {}
    for row, start, stop in segments(samples):
        numbers = model.score(model.model(samples.tokens_BT[row, start:stop][None]).last_hidden_state)[0, :, 0]
        value_BT[row, start + 1 : stop] = numbers[:-1]
        scores[row] = numbers[-1]  # of the last segment
    value_BT, score_B = torch.where(samples.mask_BT, value_BT, 0.0), torch.stack(list(scores.values()))
    mesh = Mesh(tuple(range(world.size)), name="critic", **case.sizes)
    for role, config, method, readout, loss in (
        (Critic, CriticConfig(**case.settings), "values", value_BT, value_BT[samples.mask_BT].square().mean()),
        (RewardModel, RewardModelConfig(**case.settings), "scores", score_B, score_B.square().mean()),
    ):
        made: Any = role(f"{text} {method}", world, mesh, with_scalar_head(case.spec), config)
        ref = made.scatter(samples)
        off = (getattr(made, method)(ref).gather() - readout).abs().max().item()
        assert off < 1e-5, (text, method, off)
        row = made.update(squared, ref).gather()
        close(row["loss"], loss.item(), (text, method))
        model.zero_grad()
        loss.backward(retain_graph=True)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        close(row["grad_norm"], norm, (text, method))
        if case.engine == "megatron":
            gradients = dict(checkpoint_form(case.spec, model, "grad"))
            of_gradients = gradients_off(made, HeadReference(model, gradients))  # type: ignore[arg-type]
            assert of_gradients < 1e-5, (text, method, of_gradients)
