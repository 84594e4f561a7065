"""Generation by the replicas of an engine, at once or begun and finished later; token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from aligner.data.prompts import Prompt
from aligner.data.tokenizer import load_tokenizer
from aligner.models.spec import ModelSpec
from aligner.reshard.weights import RemoteWeights, WritableWeights
from aligner.rollout.arrivals import Arrivals
from aligner.rollout.config import RolloutConfig, Sampling, StreamConfig
from aligner.rollout.engine import KINDS, SharedTensors
from aligner.rollout.engines import backend
from aligner.rollout.episodes.driver import Episodes
from aligner.rollout.episodes.figures import Figures
from aligner.rollout.episodes.source import EpisodeSource
from aligner.rollout.kind import Place, Responses, RolloutKind
from aligner.rollout.loaded import LoadedWeights, WeightSource
from aligner.rollout.rows import prompt_from, prompt_to
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import all_gather, broadcast
from aligner.spmd.partition import Shares, partition
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.rows import BatchRows
from aligner.spmd.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class SharedWeights:
    """The policy that a rollout computes with the memory of."""

    policy: Any
    """Its role."""
    tensors: SharedTensors
    """On the policy's ranks."""


@dataclass(eq=False)
class Started:
    """A generation that has been begun; the same on every rank, but for the ticket."""

    prompts: Sequence[Prompt]
    num_samples: int
    shares: Shares
    """Prompts of each replica."""
    plays: bool
    """Rows are episodes."""
    ticket: int | None
    """Of `RolloutKind.resume`, on this role's ranks."""


class GenerationRole(Role):
    """An engine on this role's ranks: ranks / (tensor x pipeline) replicas, each generating for its share of the prompts."""

    needs: ClassVar[Mapping[str, Sequence[str]]] = {
        "generate": ("weights", "cache"),
        "reshard_to": ("weights",),
        "load_folder": ("weights",),
    }

    def __init__(
        self,
        name: str,
        world: World,
        mesh: Mesh,
        spec: ModelSpec,
        config: RolloutConfig,
        sampling: Sampling,
        seed: int,
        overlap: StreamConfig | None = None,
        source: Callable[[], EpisodeSource] | None = None,
        shared: SharedWeights | None = None,
    ) -> None:
        """Args:
        source: makes what plays episodes, on the first rank of each replica; None: there is no environment.
        shared: the policy whose weights the engines compute with; None: they have their own.
        """
        super().__init__(name, world, mesh)
        self.plays = source is not None
        """Whether there is an environment to play in."""
        self.shared = shared
        """Whose weights the engines compute with; None: they have their own."""
        self._weight_owners = () if shared is None else (shared.policy,)
        self.spec, self.config, self.sampling, self.seed = spec, config, sampling, seed
        self.overlap = overlap or StreamConfig()
        self.calls = 0
        self.loaded = LoadedWeights()
        """Which weights the engines hold; the same on every rank of the world."""
        self.under_way: list[Any] = []
        """What was started and not finished; the same on every rank."""
        self._arrivals = Arrivals(world, name) if self.overlap.in_flight else None
        group, engine = world.my_group(mesh.groups("tensor", "pipeline")), backend(config.engine)
        world.residency.make_room(name, mesh)
        sleeps = world.device.type == "cpu" or world.residency.crowds(name, mesh)
        kinds = {part: kind for part, kind in KINDS.items() if sleeps and (shared is None or part != "weights")}
        world.residency.register(name, mesh, kinds, on_lost=self.loaded.evict)
        layout = engine.layout(spec, mesh, config)
        if group is None:
            self.weights: WritableWeights = RemoteWeights(layout)
            return
        ident = f"{name}{mesh.shards[self.shard or 0][0]}"
        self.engine = engine.engine_type().build(
            spec,
            mesh,
            group,
            ident,
            config,
            world.device,
            layout=layout,
            sleeps=sleeps,
            loaded=self.loaded,
            shared=None if shared is None else shared.tensors,
        )
        self.engine.requests.progress = world.activity.tick
        self._responses: RolloutKind = Responses(self.engine)
        self.weights = self.engine.weights
        if sleeps:
            world.residency.register(
                name, mesh, kinds, self.engine.parts(world.residency.meter), on_lost=self.loaded.evict
            )
            world.residency.before_evict(name, self.complete)
        world.on_leave(self.engine.close)
        if source is not None:
            first = world.rank == mesh.shards[self.shard or 0][0]
            self.episodes = Episodes(self.engine, source() if first else None, world.activity.tick)
            world.on_leave(self.episodes.close)
            world.activity.details[name] = self.episodes.report

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
        return self._at_once(prompts, num_samples, sampling, seed, plays=False)

    def play(
        self,
        tasks: Sequence[Prompt],
        num_samples: int = 1,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> Ref:
        """`num_samples` episodes of each task, to their ends.

        Args:
            tasks: the same on every rank.
            sampling: how turns are sampled; by default the configuration's `sampling`. max_tokens is a turn's.
            seed: by default a new one for every call; the same seed gives the same episodes for the same weights.

        Returns:
            Ref to `Samples`: row p * num_samples + g is episode g of task p.

        Raises:
            ValueError: the job has no environment.
        """
        if not self.plays:
            raise ValueError(
                "rollout.play needs an environment: set environment.target or environment.agent.command, or call rollout.generate."
            )
        return self._at_once(tasks, num_samples, sampling, seed, plays=True)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int = 1,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> Ref:
        """`play` where the job has an environment, else `generate`."""
        return (self.play if self.plays else self.generate)(prompts, num_samples, sampling, seed)

    def _at_once(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling | None, seed: int | None, plays: bool
    ) -> Ref:
        self.wake()
        with self.call("generate", self._weight_owners):
            return self._finish(self._start(prompts, num_samples, sampling, seed, plays=plays))

    def start(self, prompts: Sequence[Prompt], num_samples: int = 1, sampling: Sampling | None = None) -> Started:
        """Begin what `sample` does; nothing is waited for. The engine works on it whenever it works."""
        self.wake()
        with self.call("start", on_host=True):
            started = self._start(prompts, num_samples, sampling, None, self.plays)
            self.under_way.append(started)
            return started

    def finish(self, started: Started) -> Ref:
        """What `sample` returns, of something started."""
        self._check_unchanged()
        self.under_way.remove(started)
        with self.working():
            return self._finish(started)

    def take_figures(self) -> Figures:
        """What this rank's replica has spent its time on while it played, since the last time."""
        return self.episodes.take_figures() if self.plays and self.member else Figures()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the engine's own model."""
        return load_tokenizer(self.spec.path)

    def wake(self) -> None:
        """Sync the engine's weights once more, if they were given up. A role call of every rank, if so.

        Raises:
            RuntimeError: their policy has been updated since.
        """
        source = self.loaded.source_to_reload(self.name)
        if source is not None:
            source.reshard_to(self)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """RuntimeError where weights that are shared have been updated since the policy gave them."""
        if self.shared is not None:
            self.loaded.check_unchanged(self.name)

    def use_shared(self, policy: WeightSource) -> None:
        """In place of a weight sync: the engines go on with the policy's present weights, and forget their caches."""
        if self.shared is None or self.shared.policy is not policy:
            raise ValueError(
                f"{policy.name}.reshard_to({self.name}): {self.name} computes with the policy's own weights; set "
                "rollout.share_policy_weights=false, or give the other policy an engine of its own, models.NAME={kind: engine, ...}."
            )
        with self.loaded.loading(policy):
            if self.member:
                self.engine.new_weights()

    @property
    def asleep(self) -> bool:
        """The engine's weights were given up; before they were, it completed what was under way."""
        return self.loaded.evicted

    def working(self) -> AbstractContextManager[None]:
        """The role call in which what is under way is completed: it needs the engine, unless that is done."""
        if self.under_way:
            self._check_unchanged()
        return self.call("collect", on_host=True) if self.asleep else self.call("generate", self._weight_owners)

    def complete(self) -> None:
        """Finish what is under way, or play it until it is interrupted."""
        if self.under_way:
            self._work_until(_never)

    def drain_before_sync(self, policy: Mesh) -> None:
        """Complete the requests in flight before a weight sync; with `stream.in_flight` only until the policy's ranks
        are waiting with the new weights, which then meet what is left. Collective over the world.

        Args:
            policy: the mesh of the role whose weights come.
        """
        if not self.under_way or self.asleep:
            return
        self._check_unchanged()
        arrived = self._arrivals.announce(policy.ranks) if self._arrivals else _never
        with self.call("generate", self._weight_owners):
            if self.member:
                self._work_until(arrived)

    def kind(self, plays: bool) -> RolloutKind:
        """What generates rows of this kind, on this role's ranks."""
        return self.episodes if plays else self._responses

    def _work_until(self, enough: Callable[[], bool]) -> None:
        self.kind(self.plays).work_until(enough)  # episodes take along whatever else is in the engine

    def took_weights(self) -> None:
        """A sync has finished: tokens drawn from here on are marked with the version of the new weights."""
        if self.member:
            self.engine.requests.new_weights()

    def save_pending(self, started: Started) -> dict[str, Any]:
        """Something started and completed, as JSON; its samples on the first rank of the world."""
        samples_of_prompt = {}
        if started.ticket is not None:
            kind, size = self.kind(started.plays), started.num_samples
            rollouts = kind.held(started.ticket)
            for position, prompt in enumerate(started.shares[self.shard or 0]):
                own = rollouts[position * size : (position + 1) * size]
                samples_of_prompt[prompt] = [kind.to_json(one) for one in own]
            for other in all_gather(self.world, samples_of_prompt, self.mesh.ranks):
                samples_of_prompt |= other
        samples_of_prompt = broadcast(self.world, samples_of_prompt, self.mesh.ranks, [0]) or {}
        samples = [samples_of_prompt[position] for position in sorted(samples_of_prompt)]
        return {"prompts": [prompt_to(prompt) for prompt in started.prompts], "samples": samples}

    def load_pending(self, saved: Mapping[str, Any], num_samples: int) -> Started:
        """What `save_pending` wrote, dealt to the replicas there are."""
        prompts = [prompt_from(one) for one in saved["prompts"]]
        shares = partition([len(prompt.tokens) for prompt in prompts], self.mesh.data)
        ticket = None
        if self.member:
            kind = self.kind(self.plays)
            own = [kind.from_json(one, prompts[p]) for p in shares[self.shard or 0] for one in saved["samples"][p]]
            ticket = kind.hold(own)
        self.under_way.append(Started(prompts, num_samples, shares, self.plays, ticket))
        return self.under_way[-1]  # type: ignore[no-any-return]

    def _start(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling | None, seed: int | None, plays: bool
    ) -> Started:
        self.calls += 1
        shares = partition([len(prompt.tokens) for prompt in prompts], self.mesh.data)
        ticket = None
        if self.member:
            kind, call = self.kind(plays), self.calls if seed is None else -1 - seed
            rollouts = [
                kind.begin(prompts[p], Place(self.seed, call, p, g))
                for p in shares[self.shard or 0]
                for g in range(num_samples)
            ]
            kind.check(rollouts, sampling or self.sampling)
            ticket = kind.resume(rollouts, sampling or self.sampling)
        return Started(prompts, num_samples, shares, plays, ticket)

    def _finish(self, started: Started) -> Ref:
        size = started.num_samples
        row_shares = tuple(tuple(p * size + g for p in share for g in range(size)) for share in started.shares)
        rows = BatchRows(size, set(self.mesh.ranks))
        if started.ticket is None:
            return Ref(self, None, rows, row_shares)
        prompts_here = started.shares[self.shard or 0]
        kind = self.kind(started.plays)
        rollouts = kind.finish(started.ticket)
        samples = kind.samples([started.prompts[p] for p in prompts_here for _ in range(size)], rollouts)
        lengths = self.agreed(samples.length_B.tolist(), int(samples.tokens_BT.sum()))
        by_row = {
            row: n
            for share, share_lengths in zip(row_shares, lengths, strict=True)
            for row, n in zip(share, share_lengths, strict=True)
        }
        rows.lengths = [by_row[row] for row in range(len(by_row))]
        return Ref(self, samples, rows, row_shares)

    def agreed(self, value: T, check: int) -> list[T]:
        """What each replica found, on every rank of the role, after a comparison of its ranks; collective over the role.

        Args:
            check: a sum over what was sampled, equal on the ranks of a replica.
        """
        gathered = all_gather(self.world, (value, check), self.mesh.ranks)
        replica_values: list[Any] = [None] * self.mesh.data
        for rank, rank_value in zip(self.mesh.ranks, gathered, strict=True):
            shard = self.mesh.shard_of(rank)
            assert shard is not None
            if (replica_values[shard] or rank_value) != rank_value:
                raise RuntimeError(
                    f"rank {rank} sampled other tokens than its tensor-parallel neighbours of rollout replica {shard}; "
                    "their weights or random states have diverged."
                )
            replica_values[shard] = rank_value
        return [value for value, _ in replica_values]


def _never() -> bool:
    return False
