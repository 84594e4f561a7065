"""What ranks do in the tests of rows shorter than there are ranks: a step on Megatron beside transformers' model.

A case is a text such as "llama:context=2,micro=4", run on a batch of rows of given lengths. One marked "bf16" is compared with bounds of that precision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aligner.data.samples import Samples, pad_rows
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy
from tests.trainer.parity_on_ranks import VOCAB, Case, Reference, checkpoint_form, gradients_off

FREE = OptimizerConfig(lr=0.0, clip_grad=0.0)
ENTROPY = 0.1


def likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor, entropy_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -torch.where(mask_BT, policy_logp_BT + ENTROPY * entropy_BT, 0.0), {}


def batch(lengths: list[int]) -> Samples:
    generator = torch.Generator().manual_seed(len(lengths))
    tokens_BT = pad_rows([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths], torch.long)
    length_B, place_T = torch.tensor(lengths), torch.arange(tokens_BT.shape[1])
    mask_BT = (place_T >= 1) & (length_B[:, None] > place_T)
    rows = len(lengths)
    return Samples(tokens_BT, torch.ones(rows, dtype=torch.long), length_B, mask_BT, torch.arange(rows), [{}] * rows)


def reference(case: Case, samples: Samples) -> Reference:
    """The same step, written out."""
    # in float64: the smallest gradients are sums of large terms
    model = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    place_T = torch.arange(samples.tokens_BT.shape[1])
    logits = model(samples.tokens_BT, attention_mask=(samples.length_B[:, None] > place_T).long()).logits
    every = logits[:, :-1].log_softmax(-1)
    mask = samples.mask_BT[:, 1:]
    logp_BT = torch.zeros(samples.tokens_BT.shape)
    logp_BT[:, 1:] = torch.where(mask, every.gather(-1, samples.tokens_BT[:, 1:, None])[..., 0], 0.0)
    entropy = torch.where(mask, -(every.exp() * every).sum(-1), 0.0)
    loss = -(logp_BT.sum() + ENTROPY * entropy.sum()) / mask.sum()
    loss.backward()
    nothing = torch.zeros(0)
    found = Reference(model, logits.detach(), logp_BT.detach(), nothing, nothing, loss.item())
    found.gradients = dict(checkpoint_form(case.spec, model, "grad"))
    return found


def check_short_rows(world: World, folder: Path, text: str, lengths: list[int]) -> None:
    half = text.endswith(",bf16")
    case = Case(text.removesuffix(",bf16"), folder)
    samples = batch(lengths)
    expected = reference(case, samples)
    mesh = Mesh(tuple(range(world.size)), name="policy", **case.sizes)
    config = PolicyConfig(micro_tokens=case.micro_tokens, recompute=case.recompute, optimizer=FREE)
    if half:
        config = dataclasses.replace(config, dtype="bfloat16")
    name = f"{case.text} {lengths}"
    policy = Policy(name, world, mesh, case.spec, config, sequence_parallel=case.sequence_parallel)
    ref = policy.scatter(samples)
    off = (policy.logprobs(ref).gather() - expected.logp_BT).abs().max().item()
    assert off < (0.05 if half else 1e-5), (name, off)
    row = policy.update(likelihood, ref).gather()
    norm = torch.cat([grad.flatten() for grad in expected.gradients.values()]).double().norm().item()
    bound = 0.03 if half else 1e-5
    assert abs(row["loss"] - expected.loss) < bound * max(1, abs(expected.loss)), (name, row["loss"], expected.loss)
    assert abs(row["grad_norm"] - norm) < bound * norm, (name, row["grad_norm"], norm)
    assert row["tokens"] == samples.mask_BT.sum()
    if not half:  # the buffers hold the sums over the ranks: this optimizer shards only what follows
        plain = dataclasses.replace(config, optimizer=dataclasses.replace(FREE, distributed=False))
        whole = Policy(f"{name} whole", world, mesh, case.spec, plain, sequence_parallel=case.sequence_parallel)
        whole.update(likelihood, whole.scatter(samples))
        of_gradients = gradients_off(whole, expected)
        assert of_gradients < 1e-5, (name, of_gradients)
