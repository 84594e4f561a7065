"""What ranks do in test_corruption.py: rank 0 trains, rank 1 generates, and one thing at a time goes wrong in a transfer."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.read_spec import read_spec
from aligner.reshard.config import ReshardConfig
from aligner.reshard.message.bucket import Bucket
from aligner.reshard.plan.region import Piece
from aligner.reshard.sync import WeightSync
from aligner.reshard.transfer.executor import schedule_for
from aligner.rollout.config import Sampling
from aligner.rollout.role import Rollout
from aligner.rollout.vllm.experts import PackedExperts
from aligner.rollout.vllm.packing import PackedLinear
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny

MOE = "model.layers.1.mlp.experts"
NORM, EXPERT = "model.layers.1.input_layernorm.weight", f"{MOE}.3.down_proj.weight"
STALE = "model.layers.0.self_attn.qkv_proj"
GREEDY = Sampling(temperature=0.0, max_tokens=8, stop_token_ids=())


class Job:
    """Roles of their own ranks, and a transformers model whose weights the policy gets before every transfer."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.model = world, tiny.make_model("qwen3_moe", 3)
        if world.rank == 0:
            tiny.save(self.model, folder)
        dist.barrier()
        spec = read_spec(folder)
        self.policy = Policy("policy", world, Mesh((0,), name="policy"), spec, PolicyConfig(dtype="float32"))
        config = replace(tiny.CONFIG, dtype="float32")
        self.rollout = Rollout("rollout", world, Mesh((1,), name="rollout"), spec, config, GREEDY, seed=0)
        settings = {
            "whole": ReshardConfig(),
            "gloo": ReshardConfig(shared_memory=False),
            "deltas": ReshardConfig(deltas=True),
        }
        self.syncs = {
            name: WeightSync(world, self.policy.weights, self.rollout.weights, one) for name, one in settings.items()
        }
        self.steps = 0

    def step(self) -> None:
        """New weights, as after an update."""
        self.steps += 1
        torch.manual_seed(self.steps)
        tiny.randomize(self.model)
        if self.policy.member:
            tensors = tiny.tensors(self.model)
            for piece in self.policy.weights.pieces():
                self.policy.weights.view(piece).data.copy_(tiny.cut(tensors, piece))

    def transfer(self, how: str) -> str:
        """The error of this rank; the peers are waited for."""
        try:
            self.syncs[how].run()
        except Exception as error:
            if self.rollout.member:
                self.rollout.weights.discard()
            return f"{type(error).__name__}: {error}"
        finally:
            dist.barrier()
        return ""

    def answers(self) -> bool:
        """The engine answers as transformers does with the weights of this step."""
        if not self.rollout.member:
            return True
        asked = tiny.prompts(3)
        found = self.rollout.engine.generate(asked, [7, 107, 207], GREEDY)
        pairs = zip(asked, found, strict=True)
        return all(tiny.gap(self.model, prompt, one) < 1e-4 for prompt, group in pairs for one in group)


def flipped_bit(job: Job, how: str) -> AbstractContextManager[Any]:
    """The last bits of an expert's matrix, in a bucket that is packed and has not left."""
    pack = Bucket.pack

    def packed(self: Bucket, *arguments: Any) -> None:
        pack(self, *arguments)
        for number, item in enumerate(self.items):
            if item.name == EXPERT and item.lo[0] == 0:
                end = sum(-(-one.bytes // 8) for one in self.items[: number + 1])
                self.payload[end - 1] ^= 1 << 40

    return patch.object(Bucket, "pack", packed)


def skipped_write(job: Job, how: str) -> AbstractContextManager[Any]:
    """A region of the engine keeps what the transfer before left there."""
    return _views(lambda view, piece, again: view(piece) if again or piece.name != NORM else view(piece).clone())


def swapped_experts(job: Job, how: str) -> AbstractContextManager[Any]:
    """After the write, each of two experts is where the other should be."""

    def look(view: Callable[[Piece], Tensor], piece: Piece, again: bool) -> Tensor:
        other = {f"{MOE}.{a}.up_proj.weight": f"{MOE}.{b}.up_proj.weight" for a, b in ((0, 1), (1, 0))}.get(piece.name)
        if not (again and other):
            return view(piece)
        (place,) = (one for one in job.rollout.weights.pieces() if one.name == other)
        return view(place.crop(piece.lo, piece.size))

    return _views(look)


def _views(look: Callable[[Callable[[Piece], Tensor], Piece, bool], Tensor]) -> AbstractContextManager[Any]:
    """The engine's storages are looked up in another way: look(view, piece, not for the first time)."""
    view = EngineWeights.view
    seen: set[Piece] = set()

    def looked(self: EngineWeights, piece: Piece) -> Tensor:
        again = piece in seen
        seen.add(piece)
        return look(lambda one: view(self, one), piece, again)

    return patch.object(EngineWeights, "view", looked)


def lost_region(job: Job, how: str) -> AbstractContextManager[Any]:
    """Both ends have forgotten a region."""
    sync = job.syncs[how]
    streams = [replace(one, items=tuple(item for item in one.items if item.name != NORM)) for one in sync.plan.streams]
    plan = replace(sync.plan, streams=tuple(streams))
    schedule = schedule_for(plan, sync.config.bucket_bytes, sync.buffers)
    return patch.multiple(sync, plan=plan, schedule=schedule)


def stale_kernel(job: Job, how: str) -> AbstractContextManager[Any]:
    """One layer is not packed again: its kernel has the weights of the step before."""
    pack = PackedLinear.pack

    def packed(self: PackedLinear, plain: Any) -> None:
        if self._path != STALE:
            pack(self, plain)

    return patch.object(PackedLinear, "pack", packed)


def stale_experts(job: Job, how: str) -> AbstractContextManager[Any]:
    return patch.object(PackedExperts, "pack", lambda self, plain: None)


def swapped_kernels(job: Job, how: str) -> AbstractContextManager[Any]:
    """The kernel has two experts in each other's place."""
    pack = PackedExperts.pack

    def packed(self: PackedExperts, plain: Any) -> None:
        pack(self, plain)
        for weight in (self._module.w13_weight.data, self._module.w2_weight.data):
            weight[[1, 2]] = weight[[2, 1]]

    return patch.object(PackedExperts, "pack", packed)


def replayed_message(job: Job, how: str) -> AbstractContextManager[Any]:
    """A whole message of the transfer before leaves once more."""
    pack = Bucket.pack
    before: dict[Any, Tensor] = {}

    def packed(self: Bucket, *arguments: Any) -> None:
        pack(self, *arguments)
        if any(item.name == EXPERT for item in self.items):
            now = self.words.clone()
            self.words.copy_(before.setdefault(self.items, now))

    patched = patch.object(Bucket, "pack", packed)
    with patched:
        assert job.transfer(how) == ""
    job.step()
    return patched


FAULTS: dict[str, Callable[[Job, str], AbstractContextManager[Any]]] = {
    "flipped bit": flipped_bit,
    "skipped write": skipped_write,
    "swapped experts": swapped_experts,
    "lost region": lost_region,
    "stale kernel": stale_kernel,
    "stale experts": stale_experts,
    "swapped kernels": swapped_kernels,
    "replayed message": replayed_message,
}


@functools.cache
def job_of(world: World, folder: Path) -> Job:
    """One engine for all faults."""
    return Job(world, folder)


def meet(world: World, folder: Path, fault: str, how: str) -> dict[str, Any]:
    """A transfer that succeeds, one with the fault, and one that makes good: what this rank sees.

    Args:
        folder: for the model's checkpoint.
        fault: one of FAULTS.
        how: "whole", "gloo" or "deltas".
    """
    job = job_of(world, folder)
    job.step()
    assert job.transfer(how) == ""
    job.step()
    broken = FAULTS[fault](job, how)
    start = time.perf_counter()
    with broken:
        error = job.transfer(how)
    seconds, ready = time.perf_counter() - start, job.rollout.member and job.rollout.engine.loaded.complete
    job.step()
    return {
        "error": error,
        "seconds": seconds,
        "ready": ready,
        "afterwards": job.transfer(how),
        "answers": job.answers(),
    }
