"""The Megatron policy against transformers: logits, a whole GRPO step's loss and gradients, and exported checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

BASE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama3": LlamaConfig(**BASE, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "qwen2": Qwen2Config(
        **BASE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False
    ),
    "qwen2_tied": Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**BASE, head_dim=48, tie_word_embeddings=True),
}

PROGRAM = """
import sys, functools, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from aligner.data.samples import Samples, pad_rows
from aligner.models.spec import read_spec
from aligner.objective.advantages import group_advantages
from aligner.objective.losses import clipped_surrogate
from aligner.policy import pipeline
from aligner.policy.config import OptimizerConfig, PolicyConfig
from aligner.policy.policy import Policy
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World

folder, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
world = World(100)
everyone = tuple(range(world.size))
LENGTHS, PROMPT, G = [9, 17, 12, 5, 16, 16, 7, 21], 3, 2
generator = torch.Generator().manual_seed(3)
rows = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in LENGTHS]
length_B = torch.tensor(LENGTHS)
tokens_BT = pad_rows(rows, torch.long)
place_T = torch.arange(tokens_BT.shape[1])
mask_BT = (place_T >= PROMPT) & (place_T < length_B[:, None])
reward_B = torch.tensor([1.0, 0.0, 0.3, 0.9, float("nan"), 0.5, 0.2, 0.7])

def hf(name):
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    attention = (place_T < length_B[:, None]).long()
    logits = model(tokens_BT, attention_mask=attention).logits
    logp = torch.zeros(tokens_BT.shape)
    logp[:, 1:] = logits[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    return model, logits, logp

for layout in layouts:
    name, tensor, stages, sequence, recompute = layout.split(",")
    model, logits, logp_BT = hf(name)
    noise = 0.3 * torch.randn(tokens_BT.shape, generator=torch.Generator().manual_seed(4))
    rollout_logp_BT = torch.where(mask_BT, logp_BT.detach() + noise, 0.0)
    reference_logp_BT = torch.where(mask_BT, logp_BT.detach() - noise.flip(0), 0.0)
    # plain PyTorch, written out: GRPO loss of the whole batch as one token mean
    grouped = reward_B.view(-1, G)
    adv = []
    for group in grouped:
        ok = group[~group.isnan()]
        for r in group:
            adv.append(0.0 if r.isnan() or len(ok) < 2 else float((r - ok.mean()) / (ok.std() + 1e-4)))
    A = torch.tensor(adv)[:, None]
    ratio = (logp_BT - rollout_logp_BT).exp()
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    d = reference_logp_BT - logp_BT
    expected = (torch.where(mask_BT, -surrogate + 0.05 * (d.exp() - d - 1), 0.0)).sum() / mask_BT.sum()
    expected.backward()

    mesh = Mesh(everyone, int(tensor), int(stages))
    spec = read_spec(str(folder / name))
    config = PolicyConfig(micro_tokens=40, recompute=recompute, optimizer=OptimizerConfig(lr=0.0, clip_grad=0.0))
    policy = Policy("policy" + layout, world, mesh, spec, config, sequence_parallel=sequence == "sp")
    # logits: caught where the log-probabilities are made
    caught = []
    inner = pipeline.logprobs_and_entropy
    def catching(logits_TV, *rest):
        caught.append(logits_TV.detach().clone())
        return inner(logits_TV, *rest)
    pipeline.logprobs_and_entropy = catching
    samples = Samples(tokens_BT, torch.full((8,), PROMPT), length_B, mask_BT, torch.arange(8) // G, [{"row": row} for row in range(8)], rollout_logp_BT)
    ref = policy.place(samples, G)
    got = policy.logprobs(ref).get()
    pipeline.logprobs_and_entropy = inner
    assert (got - torch.where(mask_BT, logp_BT, 0)).abs().max() < 1e-5, (layout, (got - logp_BT).abs().max())
    if caught and mesh.data == 1:
        from aligner.policy.packing import microbatches
        worst = 0.0
        for batch, part in zip(microbatches(LENGTHS, 40), caught):
            parts = [torch.empty_like(part) for _ in range(mesh.tensor)]
            dist.all_gather(parts, part, group=policy.groups.tp)
            flat = torch.cat(parts, -1)[:, :61]
            at = 0
            for row in batch:
                worst = max(worst, (flat[at:at + LENGTHS[row]] - logits[row, :LENGTHS[row]]).abs().max().item())
                at += LENGTHS[row]
        assert worst < 1e-5, (layout, worst)
    loss = functools.partial(clipped_surrogate, clip_low=0.2, clip_high=0.28, kl_coef=0.05)
    index = policy.run(lambda s: torch.tensor([field["row"] for field in s.fields]), ref)
    advantage = policy.run(lambda i: group_advantages(reward_B[i], group_size=G), index)
    reference = policy.run(lambda i, s: reference_logp_BT[i][:, : s.tokens_BT.shape[1]], index, ref)
    row = policy.update(loss, ref, advantage_B=advantage, reference_logp_BT=reference).get()
    assert abs(row["loss"] - expected.item()) < 1e-5 * max(1, abs(expected.item())), (layout, row["loss"], expected.item())
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    assert abs(row["grad_norm"] - norm) < 1e-5 * norm, (layout, row["grad_norm"], norm)
    worst = 0.0
    if mesh.data == 1:   # with data shards each rank holds only its part of the reduced gradient
        grads = dict(model.named_parameters())
        for piece in policy.model.layout:
            flat = policy.model.parameters[piece.storage].main_grad.view(-1)
            mine = flat.as_strided(piece.size, piece.stride, flat.storage_offset() + piece.offset)
            theirs = grads[piece.name].grad[tuple(slice(lo, lo + n) for lo, n in zip(piece.lo, piece.size))]
            worst = max(worst, ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item())
        assert worst < 1e-5, (layout, worst)
    policy.save_checkpoint(out / layout)
    if world.rank == 0:
        old, new = model.state_dict(), AutoModelForCausalLM.from_pretrained(out / layout, dtype=torch.float32).state_dict()
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old), layout
    print(f"{layout} loss {row['loss']} gradient off by {worst}\\n", end="", flush=True)
world.leave()
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small checkpoint of each family, with biases and norms that are not their defaults."""
    from aligner.data.column_addition import write_tokenizer

    folder = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or "bias" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif "proj" in key:
                    parameter.mul_(4)  # peaked attention, so that errors of position or order show
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, ["1,1,no,none"]),
        (2, ["2,1,no,none", "2,1,sp,full", "1,2,no,full", "1,1,no,selective"]),
        (4, ["2,2,no,none", "2,2,sp,selective", "1,2,no,none"]),
    ],
)
def test_a_step_equals_transformers(
    torchrun, checkpoints: Path, tmp_path: Path, ranks: int, layouts: list[str]
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "parity.py").write_text(PROGRAM)
    cases = [f"{name},{layout}" for name in FAMILIES for layout in layouts]
    done = torchrun(ranks, [str(tmp_path / "parity.py"), str(checkpoints), str(tmp_path), *cases], seconds=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for case in cases:
        assert done.stdout.count(f"{case} loss") == ranks
