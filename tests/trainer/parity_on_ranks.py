"""What ranks do in the parity tests: a GRPO step on Megatron beside the same step in plain PyTorch on transformers' model.

A case is a text such as "llama:tensor=2,pipeline=2,sp,recompute=full".
A case marked "adam" also compares the weights after a step of the distributed optimizer. One marked "bf16" checks the
gradient's norm alone: every element counts once, whichever rank has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aligner.data.samples import Samples, pad_rows
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import expert_tensors
from aligner.objective.advantages import group_advantages
from aligner.objective.losses import clipped_surrogate
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.context import split_rows
from aligner.trainer.output_layer import PackedOutput
from aligner.trainer.policy import Policy

LENGTHS, PROMPT, G, VOCAB = [9, 17, 12, 5, 16, 16, 7, 21], 3, 2, 61
GENERATOR = torch.Generator().manual_seed(3)
ROWS = [torch.randint(3, VOCAB, (n,), generator=GENERATOR).tolist() for n in LENGTHS]
LENGTH_B = torch.tensor(LENGTHS)
TOKENS_BT = pad_rows(ROWS, torch.long)
PLACE_T = torch.arange(TOKENS_BT.shape[1])
MASK_BT = (PLACE_T >= PROMPT) & (LENGTH_B[:, None] > PLACE_T)
REWARD_B = torch.tensor([1.0, 0.0, 0.3, 0.9, float("nan"), 0.5, 0.2, 0.7])
ADAM = OptimizerConfig(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-2, weight_decay=0.1, clip_grad=0.5)
"""An epsilon that keeps Adam's first step from being the gradient's sign, which rounding turns where it is small."""


@dataclass
class Reference:
    """Transformers' model and its step, written out: GRPO loss of the whole batch as one token mean."""

    model: PreTrainedModel
    logits_BTV: Tensor
    logp_BT: Tensor
    rollout_logp_BT: Tensor
    reference_logp_BT: Tensor
    loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """By the checkpoint's names."""


def reference(folder: Path, spec: ModelSpec) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits_BTV = model(TOKENS_BT, attention_mask=(LENGTH_B[:, None] > PLACE_T).long()).logits
    logp_BT = torch.zeros(TOKENS_BT.shape)
    logp_BT[:, 1:] = logits_BTV[:, :-1].log_softmax(-1).gather(-1, TOKENS_BT[:, 1:, None])[..., 0]
    noise = 0.3 * torch.randn(TOKENS_BT.shape, generator=torch.Generator().manual_seed(4))
    rollout_logp_BT = torch.where(MASK_BT, logp_BT.detach() + noise, 0.0)
    reference_logp_BT = torch.where(MASK_BT, logp_BT.detach() - noise.flip(0), 0.0)
    advantages = []
    for group in REWARD_B.view(-1, G):
        ok = group[~group.isnan()]
        for r in group:
            advantages.append(0.0 if r.isnan() or len(ok) < 2 else float((r - ok.mean()) / (ok.std() + 1e-4)))
    A = torch.tensor(advantages)[:, None]
    ratio = (logp_BT - rollout_logp_BT).exp()
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    d = reference_logp_BT - logp_BT
    loss = (torch.where(MASK_BT, -surrogate + 0.05 * (d.exp() - d - 1), 0.0)).sum() / MASK_BT.sum()
    loss.backward()
    found = Reference(model, logits_BTV.detach(), logp_BT.detach(), rollout_logp_BT, reference_logp_BT, loss.item())
    found.gradients = {name: grad for name, grad in checkpoint_form(spec, model, "grad")}
    return found


def checkpoint_form(spec: ModelSpec, model: PreTrainedModel, what: str) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters or gradients under the checkpoint's names: transformers fuses experts in memory."""
    for name, parameter in model.named_parameters():
        value = getattr(parameter, what)
        if ".mlp.experts." in name:
            layer = int(name.split(".")[2])
            for expert in range(spec.experts):
                gate, up, down = expert_tensors(spec, layer, expert)
                if name.endswith("gate_up_proj"):
                    yield from zip((gate, up), value[expert].chunk(2), strict=True)
                else:
                    yield down, value[expert]
        else:
            sparse = spec.family == "mixtral"
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if sparse else name, value


class Case:
    """A model under a layout."""

    def __init__(self, text: str, folder: Path) -> None:
        self.text = text
        name, _, options = text.partition(":")
        given = dict(option.partition("=")[::2] for option in options.split(",") if option)
        self.adam = given.pop("adam", None) is not None
        self.dtype = "float32" if given.pop("bf16", None) is None else "bfloat16"
        self.sequence_parallel = given.pop("sp", None) is not None
        self.recompute = given.pop("recompute", "none")
        self.experts = given.pop("experts", "sequential")
        self.micro_tokens = int(given.pop("micro", "40"))
        self.share_prefix = given.pop("share", "auto")
        stages = tuple(int(n) for n in given.pop("stage_layers", "").split("+") if n)
        self.sizes: dict[str, Any] = {axis: int(size) for axis, size in given.items()} | {"stage_layers": stages}
        self.folder = folder / name
        self.spec = read_spec(self.folder)

    def policy(self, world: World, optimizer: OptimizerConfig) -> Policy:
        mesh = Mesh(tuple(range(world.size)), name="policy", **self.sizes)
        config = PolicyConfig(
            dtype=self.dtype,
            micro_tokens=self.micro_tokens,
            recompute=self.recompute,
            experts=self.experts,
            optimizer=optimizer,
        )
        name = f"{self.text} {optimizer.distributed}"
        return Policy(name, world, mesh, self.spec, config, sequence_parallel=self.sequence_parallel)


def logits_off(policy: Policy, samples: Samples, logits_BTV: Tensor, caught: list[Tensor]) -> float:
    """The largest difference of any logit that this rank has of its shard's rows, on the last stage: of all tokens, or of those
    that precede a token in the mask where the last layer has left out the others."""
    worst, mine, lengths = 0.0, [field["row"] for field in samples.fields], samples.length_B.tolist()
    context = policy.mesh.coordinates(policy.world.rank)["context"]
    for batch, part in zip(
        policy.microbatches(policy.context_tree(samples), policy.config.micro_tokens), caught, strict=False
    ):
        parts = [torch.empty_like(part) for _ in range(policy.mesh.tensor)]
        dist.all_gather(parts, part, group=policy.engine.groups.tp)
        flat = torch.cat(parts, -1)[:, :VOCAB]
        pieces = split_rows(tuple(lengths[row] for row in batch), policy.mesh.context).spans[context]
        tokens = [(batch[piece.row], place) for piece in pieces for place in range(piece.start, piece.stop)]
        if len(flat) < len(tokens):
            width = samples.mask_BT.shape[1]
            tokens = [(row, at) for row, at in tokens if at + 1 < width and samples.mask_BT[row, at + 1]]
            assert len(flat) == max(1, len(tokens))
        for logits_V, (row, place) in zip(flat, tokens, strict=False):
            worst = max(worst, (logits_V - logits_BTV[mine[row], place]).abs().max().item())
    return worst


def check_logits(policy: Policy, ref: Any, expected: Reference) -> float:
    caught: list[Tensor] = []
    inner = PackedOutput.logprobs_and_entropy

    def catching(output: PackedOutput, *rest: Any, **named: Any) -> Any:
        caught.append(output.output_KX @ output.weight_VH.T)
        return inner(output, *rest, **named)

    PackedOutput.logprobs_and_entropy = catching
    got = policy.logprobs(ref).gather()
    PackedOutput.logprobs_and_entropy = inner
    off = (got - torch.where(MASK_BT, expected.logp_BT, 0)).abs().max().item()
    samples = policy.localize((ref,), {}).args[0]
    return max(off, logits_off(policy, samples, expected.logits_BTV, caught))


def update(policy: Policy, ref: Any, expected: Reference) -> dict[str, float]:
    loss = functools.partial(clipped_surrogate, clip_low=0.2, clip_high=0.28, kl_coef=0.05)
    index = policy.map(lambda s: torch.tensor([field["row"] for field in s.fields]), ref)
    advantage = policy.map(lambda i: group_advantages(REWARD_B[i], group_size=G), index)
    others = policy.map(lambda i, s: expected.reference_logp_BT[i][:, : s.tokens_BT.shape[1]], index, ref)
    return policy.update(loss, ref, advantage_B=advantage, reference_logp_BT=others).gather()  # type: ignore[no-any-return]


def gradients_off(policy: Policy, expected: Reference) -> float:
    """The largest difference of any gradient, relative to the largest gradient of its tensor."""
    worst = 0.0
    for piece in policy.weights.pieces():
        flat = policy.engine.model.parameters[piece.storage].main_grad.view(-1)  # type: ignore[attr-defined]
        mine = flat.as_strided(piece.size, piece.stride, flat.storage_offset() + piece.offset)
        box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
        whole = expected.gradients[piece.name]
        worst = max(worst, ((mine - whole[box]).abs().max() / whole.abs().max().clamp(min=1e-3)).item())
    return worst


def adam(model: PreTrainedModel) -> None:
    """The same optimizer step by torch's own AdamW and clipping."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": ADAM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps).step()


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def batch(expected: Reference) -> Samples:
    fields = [{"row": row} for row in range(8)]
    return Samples(
        TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8) // G, fields, expected.rollout_logp_BT
    )


def check_step(world: World, folder: Path, out: Path, text: str) -> None:
    """`text`: the case, of the checkpoints in `folder`."""
    case = Case(text, folder)
    expected = reference(case.folder, case.spec)
    policy = case.policy(world, OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=False))
    ref = policy.scatter(batch(expected), G)
    of_logits = check_logits(policy, ref, expected)
    assert of_logits < 1e-5, (case.text, of_logits)
    row = update(policy, ref, expected)
    assert abs(row["loss"] - expected.loss) < 1e-5 * max(1, abs(expected.loss)), (case.text, row["loss"], expected.loss)
    norm = torch.cat([grad.flatten() for grad in expected.gradients.values()]).double().norm().item()
    of_gradients = gradients_off(policy, expected)
    assert of_gradients < 1e-5, (case.text, of_gradients)
    assert abs(row["grad_norm"] - norm) < 1e-5 * norm, (case.text, row["grad_norm"], norm)
    policy.save_checkpoint(out / case.text / "same")
    if world.rank == 0:
        old, new = stored(case.folder), stored(out / case.text / "same")
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old), case.text
    if case.adam:
        check_adam(case, world, expected, norm, out / case.text / "trained")
    # Megatron's code that reads a global group in place of the one it was given raises, and is never silently wrong.
    assert not parallel_state.model_parallel_is_initialized()


def check_adam(case: Case, world: World, expected: Reference, norm: float, folder: Path) -> None:
    """A step of the distributed optimizer: clipped by the whole norm, its weights those of torch's AdamW."""
    policy = case.policy(world, ADAM)
    row = update(policy, policy.scatter(batch(expected), G), expected)
    assert abs(row["grad_norm"] - norm) < 1e-5 * norm, (case.text, row["grad_norm"], norm)
    policy.save_checkpoint(folder)
    if world.rank == 0:
        adam(expected.model)
        new = stored(folder)
        for name, value in checkpoint_form(case.spec, expected.model, "data"):
            off = (new[name] - value).abs().max().item()
            assert off < 1e-5 * max(1.0, value.abs().max().item()), (case.text, name, off)


def norm_of_pieces(policy: Policy) -> float:
    """The norm over the pieces of all ranks, each region of a tensor once, whoever has copies of it."""
    mine = {}
    for piece in policy.weights.pieces():
        flat = policy.engine.model.parameters[piece.storage].main_grad.view(-1)  # type: ignore[attr-defined]
        values = flat.as_strided(piece.size, piece.stride, flat.storage_offset() + piece.offset)
        mine[piece.name, tuple(piece.lo), tuple(piece.size)] = values.double().pow(2).sum().item()
    found: list[Any] = [None] * policy.world.size
    dist.all_gather_object(found, mine)
    return sum({region: square for one in found for region, square in one.items()}.values()) ** 0.5


def check_norm(world: World, folder: Path, text: str) -> None:
    """Megatron's norm, by either optimizer, is that of the gradients that there are (experts on tensor ranks among them)."""
    case = Case(text, folder)
    expected = reference(case.folder, case.spec)
    norm = 0.0
    for distributed in (False, True):
        policy = case.policy(world, OptimizerConfig(lr=0.0, clip_grad=0.0, distributed=distributed))
        row = update(policy, policy.scatter(batch(expected), G), expected)
        norm = norm or norm_of_pieces(policy)
        assert abs(row["grad_norm"] - norm) < 1e-5 * norm, (case.text, distributed, row["grad_norm"], norm)
    assert not parallel_state.model_parallel_is_initialized()
