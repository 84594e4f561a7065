"""The rollout role: vLLM replicas that turn prompts into samples; token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, pad_rows
from aligner.models.spec import ModelSpec
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engine import Completion, RolloutEngine
from aligner.rollout.sleep import KINDS, parts_of
from aligner.rollout.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import everyone
from aligner.spmd.partition import partition
from aligner.spmd.ref import Ref, Rows
from aligner.spmd.role import Role
from aligner.spmd.world import World

if TYPE_CHECKING:
    from aligner.policy.policy import Policy


def request_seed(*parts: int) -> int:
    """A seed for one prompt's samples, a function of its arguments only: no layout changes what is sampled.

    vLLM gives sample i of a request seed + i, so seeds are spread over 2^48 and never neighbours.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 16


class Rollout(Role):
    """vLLM on this role's ranks: ranks / (tensor x pipeline) replicas, each generating for its share of the prompts."""

    needs: ClassVar[Mapping[str, Sequence[str]]] = {"generate": ("weights", "cache"), "reshard_to": ("weights",)}

    def __init__(
        self, name: str, world: World, mesh: Mesh, spec: ModelSpec, config: RolloutConfig, sampling: Sampling, seed: int
    ) -> None:
        super().__init__(name, world, mesh)
        self.config, self.sampling, self.seed = config, sampling, seed
        self.calls = 0
        self.sender: Policy | None = None
        """Whose weights the engine was given last."""
        replica = world.my_group(mesh.groups("tensor", "pipeline"))
        world.residency.make_room(name, mesh)
        sleeps = world.device.type == "cpu" or world.residency.crowds(name, mesh)
        world.residency.register(name, mesh, KINDS if sleeps else {})
        if replica is None:
            return
        first = mesh.shards[self.shard or 0][0]
        self.engine = RolloutEngine(
            spec.path, replica, f"{name}{first}", config, world.device, mesh.expert > 1, mesh.pipeline, sleeps
        )
        self.weights = EngineWeights(self.engine)
        if sleeps:
            parts = parts_of(self.engine, self.weights, world.residency.meter)
            world.residency.register(name, mesh, KINDS, parts)
        world.on_leave(self.engine.close)

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int = 1,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> Ref:
        """`num_samples` responses to each prompt.

        Args:
            prompts: the same on every rank.
            sampling: how to sample; by default the configuration's `sampling`.
            seed: by default a new one for every call; the same seed gives the same samples for the same weights.

        Returns:
            Ref to `Samples`: row p * num_samples + g is sample g of prompt p.
        """
        if self.sender is not None and self.world.residency.is_out(self.name, "weights"):
            self.sender.send_again(self)
        with self.call("generate"):
            self.calls += 1
            seeds = [request_seed(self.seed, self.calls if seed is None else -1 - seed, i) for i in range(len(prompts))]
            shares = partition([len(prompt.tokens) for prompt in prompts], self.mesh.data)
            row_shares = tuple(
                tuple(p * num_samples + g for p in share for g in range(num_samples)) for share in shares
            )
            rows = Rows(num_samples, set(self.mesh.ranks))
            if not self.member:
                return Ref(self, None, rows, row_shares)
            mine = shares[self.shard or 0]
            found = self.engine.generate(
                [list(prompts[p].tokens) for p in mine],
                [seeds[p] for p in mine],
                sampling or self.sampling,
                num_samples,
            )
            samples = _as_samples([prompts[p] for p in mine], found)
            rows.lengths = self._lengths(samples, row_shares)
            return Ref(self, samples, rows, row_shares)

    def _lengths(self, samples: Samples, shares: Sequence[Sequence[int]]) -> list[int]:
        """Lengths of all rows on every rank of the role; replicas of one shard must agree."""
        check = int(samples.tokens_BT.sum())
        gathered = everyone(self.world, (self.shard, samples.length_B.tolist(), check), self.mesh.ranks)
        by_shard: dict[int, tuple[list[int], int]] = {}
        for rank, (shard, lengths, total) in zip(self.mesh.ranks, gathered, strict=True):
            if by_shard.setdefault(shard, (lengths, total)) != (lengths, total):
                raise RuntimeError(
                    f"rank {rank} sampled other tokens than its tensor-parallel neighbours of rollout replica {shard}; "
                    "their weights or random states have diverged."
                )
        lengths_by_row = {
            row: n for s, share in enumerate(shares) for row, n in zip(share, by_shard[s][0], strict=True)
        }
        return [lengths_by_row[row] for row in range(len(lengths_by_row))]


def _as_samples(prompts: Sequence[Prompt], found: Sequence[Sequence[Completion]]) -> Samples:
    rows = [(prompt, completion) for prompt, group in zip(prompts, found, strict=True) for completion in group]
    tokens = [[*prompt.tokens, *completion.tokens] for prompt, completion in rows]
    prompt_len_B = torch.tensor([len(prompt.tokens) for prompt, _ in rows], dtype=torch.long)
    length_B = torch.tensor([len(row) for row in tokens], dtype=torch.long)
    tokens_BT = pad_rows(tokens, torch.long)
    place_T = torch.arange(tokens_BT.shape[1])
    logp = [[0.0] * len(prompt.tokens) + list(completion.logp) for prompt, completion in rows]
    return Samples(
        tokens_BT=tokens_BT,
        prompt_len_B=prompt_len_B,
        length_B=length_B,
        mask_BT=(place_T >= prompt_len_B[:, None]) & (place_T < length_B[:, None]),
        prompt_index_B=torch.tensor([prompt.index for prompt, _ in rows], dtype=torch.long),
        fields=[{"prompt": prompt.text, **prompt.fields} for prompt, _ in rows],
        rollout_logp_BT=pad_rows(logp, torch.float32),
        truncated_B=torch.tensor([completion.truncated for _, completion in rows], dtype=torch.bool),
    )
