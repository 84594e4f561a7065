"""What ranks do in test_half_rollout.py: a sync of a float32 policy into transformers engines in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from aligner.data.prompts import Prompt
from aligner.models.read_spec import read_spec
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import Sampling
from aligner.rollout.role import Rollout
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny

DRAWN = Sampling(temperature=0.9, max_tokens=16, stop_token_ids=())
PROMPTS = [Prompt(tuple(tokens), "", {}, index) for index, tokens in enumerate(tiny.prompts(6))]


def check(world: World, folder: Path, where: str) -> None:
    """Every tensor to the last bit; log-probabilities to bfloat16's rounding in batches of other shapes."""
    spec, ranks = read_spec(folder), tuple(range(world.size))
    policy_ranks, rollout_ranks = (ranks, ranks) if where == "colocated" else (ranks[:1], ranks[1:])
    mesh = Mesh(policy_ranks, name="policy")
    policy = Policy("policy", world, mesh, spec, PolicyConfig(engine="fsdp"), total_steps=1, syncs=WeightSyncs())
    settings = replace(tiny.config("transformers"), dtype="bfloat16")
    rollout = Rollout("rollout", world, Mesh(rollout_ranks, name="rollout"), spec, settings, DRAWN, 7)
    policy.reshard_to(rollout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if rollout.member:
        storages = rollout.engine.storages  # type: ignore[attr-defined]
        assert {value.dtype for value in storages.values()} == {torch.float32, torch.bfloat16}
        assert all(
            value.dtype == held[name].dtype and torch.equal(value, held[name]) for name, value in storages.items()
        )
    samples = rollout.generate(PROMPTS, 2).gather()
    for row, length in enumerate(samples.length_B.tolist()):
        begin = int(samples.prompt_len_B[row])
        prompt, tokens = samples.tokens_BT[row, :begin].tolist(), samples.tokens_BT[row, begin:length].tolist()
        expected = tiny.log_probabilities(model, prompt, tokens, 0.9)
        assert (samples.rollout_logp_BT[row, begin:length] - expected).abs().max() < 0.15
