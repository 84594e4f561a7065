"""What ranks do in test_fsdp_families.py: a policy on FSDP brought to a vLLM engine, which then answers as transformers does."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.reshard.config import ReshardConfig
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import RolloutConfig
from aligner.rollout.role import Rollout
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.e2e.families_on_ranks import DRAWN, ask, stock
from tests.trainer.engines_on_ranks import LENGTH_B, MASK_BT, PROMPT, TOKENS_BT
from tests.trainer.fsdp.families import save_model

CONFIG = RolloutConfig(dtype="float32", kv_cache_mib=16, max_model_len=64, max_num_seqs=8)


def check(world: World, family: str, root: Path, where: str, tensor: int = 1) -> float:
    """Largest difference of the engine's log-probabilities from transformers'. What is moved is the minimum, and the answers are
    those of an engine that loaded the checkpoint, to the last bit."""
    folder = root / family
    if world.rank == 0:
        save_model(family, folder)
    dist.barrier()
    spec, everyone = read_spec(folder), tuple(range(world.size))
    half = everyone[: world.size // 2] if where == "split" else everyone
    others = everyone[world.size // 2 :] if where == "split" else everyone
    syncs = WeightSyncs(ReshardConfig())
    policy = Policy(
        "policy", world, Mesh(half, name="policy"), spec, PolicyConfig(engine="fsdp"), total_steps=1, syncs=syncs
    )
    samples = Samples(TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8), [{}] * 8, 0.0 * MASK_BT)
    before = policy.logprobs(policy.scatter(samples)).gather()
    # made before the engine, whose transformers backend wraps classes of the process
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    mesh = Mesh(others, tensor=tensor, name="rollout")
    rollout = Rollout("rollout", world, mesh, spec, CONFIG, DRAWN, seed=0)
    for _ in range(2):
        policy.reshard_to(rollout)
    answer = ask(rollout.engine) if rollout.member else None
    after = policy.logprobs(policy.scatter(samples)).gather()
    assert torch.equal(before, after), "an engine in the process changes what transformers' class computes"
    rows = syncs.by_rollout["rollout"].stats
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, [(row.moved_bytes, row.minimum_bytes) for row in rows])
    for sync in range(2):
        moved, least = (sum(rank[sync][which] for rank in told) for which in (0, 1))
        assert moved == least and (where == "colocated" or moved > 0), f"{moved} bytes moved, {least} needed"
    for close in world._closers:
        close()
    world._closers.clear()
    del rollout
    gc.collect()
    if answer is None:
        return 0.0
    group = world.my_group(mesh.groups("tensor"))
    assert stock(folder, group, f"fresh{others[0]}", CONFIG) == answer, (
        "differs from an engine that loaded the checkpoint"
    )
    worst = 0.0
    for sample in (sample for group_of in answer[len(answer) // 2 :] for sample in group_of):
        tokens = torch.tensor([*sample.prompt, *sample.tokens])
        with torch.no_grad():
            logp = whole(tokens[None], use_cache=False).logits[0].log_softmax(-1)
        at = torch.arange(len(sample.prompt) - 1, len(tokens) - 1)
        off = logp[at, tokens[at + 1]] - torch.tensor(sample.logp)
        worst = max(worst, off.abs().max().item())
    return worst
