"""What ranks do in the tests of episodes: played under layouts and in any order, streamed, trained on, saved and resumed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.config.schema import compose_config, to_config
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.off_policy import decoupled_surrogate
from aligner.roles import episode_source
from aligner.roles.build import Roles, build_roles
from aligner.rollout.arrivals import Arrivals
from aligner.rollout.config import StreamConfig
from aligner.run.job import Job
from aligner.run.prepare import prepare
from aligner.spmd.messages import broadcast
from aligner.spmd.ref import Ref
from aligner.spmd.world import World
from tests.rollout.episodes.scripted import Scripted

BATCHES, TASKS, SAMPLES = 5, 3, 2
STREAMS = {
    "lag 0": StreamConfig(),
    "lag 1": StreamConfig(lag=1),
    "in flight": StreamConfig(lag=1, in_flight=True),
    "partial": StreamConfig(step_tokens=9),
    "partial, ahead": StreamConfig(step_tokens=9, lag=1),
}


class AfterAsks(Arrivals):
    """The policy is there when the engine has asked five times, so in the middle of episodes."""

    def announce(self, ranks: Any) -> Callable[[], bool]:
        there, asked = super().announce(ranks), iter(range(100000))
        return lambda: there() and next(asked) >= 5


class Episodic:
    """The same tasks, played in several ways."""

    def __init__(self, world: World, job: Job, roles: Roles, sources: list[Scripted]) -> None:
        self.world, self.job, self.policy, self.rollout = world, job, roles.policy, roles.rollout
        self.sources, self.begun = sources, itertools.count()

    def shuffled(self, seed: int | None) -> None:
        """From here on, what is ready comes in another order and with waits."""
        for source in self.sources:
            source.order = None if seed is None else random.Random(seed + self.world.rank)
            source.delay_s = (0.0, 0.0) if seed is None else (0.0, 0.02)

    def batches(self, first: int = 0) -> Iterator[list[Any]]:
        for number in range(first, BATCHES):
            yield self.job.checked.data.training[number * TASKS : (number + 1) * TASKS]

    def begin(self, config: StreamConfig, first: int = 0) -> Iterator[Ref]:
        self.rollout.overlap = config
        name = f"episodes {next(self.begun)}"
        self.rollout._arrivals = AfterAsks(self.world, name) if config.in_flight else None
        return self.rollout.stream(self.batches(first), SAMPLES)

    def played(self) -> list[Any]:
        self.rollout.calls = 0
        return [content(self.rollout.play(batch, SAMPLES).gather()) for batch in self.batches()]

    def streamed(self, name: str) -> list[Any]:
        """Whatever the stream, episodes are those of `play`."""
        self.rollout.calls = 0
        found = []
        for samples in self.begin(STREAMS[name]):
            self.policy.reshard_to(self.rollout)
            found.append(content(samples.gather()))
        return found

    def trained(self, name: str) -> dict[str, Any]:
        """Weights change at every step: the policy's log-probabilities under each token's version, beside the engine's; the
        weights in the end."""
        policy, rollout, start = self.policy, self.rollout, self.weights()
        first, policy.optimizer_steps = policy.version, 0
        if policy.member:
            policy.engine.reset_moments(1)  # each training starts from the same
        kept, seen = [start], []
        policy.reshard_to(rollout)
        rollout.calls = 0
        for samples in self.begin(STREAMS[name]):
            reward_B = samples["episode_reward_B"]
            advantage_B = policy.map(advantages, reward_B)
            trained = policy.map(leave_out_unscored, samples, reward_B)
            policy.update(decoupled_surrogate, trained, advantage_B=advantage_B).gather()
            policy.reshard_to(rollout)
            kept.append(self.weights())
            seen.append(samples)
        worst, versions, several = 0.0, set(), 0
        for samples in seen:
            whole: Samples = samples.gather()
            assert whole.version_BT is not None and whole.rollout_logp_BT is not None
            several += sum(
                len(row[mask].unique()) > 1 for row, mask in zip(whole.version_BT, whole.mask_BT, strict=True)
            )
            for version in whole.version_BT[whole.mask_BT].unique().tolist():
                self.restore(kept[version - first])
                logp_BT: Tensor = policy.logprobs(samples).gather()
                at_BT = whole.mask_BT & (whole.version_BT == version)
                worst = max(worst, float((logp_BT - whole.rollout_logp_BT).abs()[at_BT].max()))
                versions.add(version - first)
        end = [float(value.double().sum()) for value in kept[-1]]
        found = {"worst": worst, "versions": sorted(versions), "several": several}
        self.restore(start)
        return found | {"weights": Ref(policy, end).gather(), "rows": [content(s.gather()) for s in seen]}

    def resumed(self) -> tuple[list[Any], list[Any]]:
        """Episodes of an uninterrupted stream; of one that is saved after two steps, and goes on in new environments."""
        rollout, policy = self.rollout, self.policy
        policy.reshard_to(rollout)
        rollout.calls = 0
        whole = [content(samples.gather()) for samples in self.begin(STREAMS["partial"])]
        rollout.calls, rollout._streams = 0, []
        stream = self.begin(STREAMS["partial"])
        found = [content(next(stream).gather()) for _ in range(2)]
        saved = rollout.save_state()
        shared = json.loads(json.dumps(saved)) if self.world.rank == 0 else None
        shared = broadcast(self.world, shared, [0], range(self.world.size))
        consumed = self.consumed
        for source in self.sources:  # the environments of the run that has ended
            source.plays.clear()
        if rollout.member:
            rollout.episodes._playing.clear()
        rollout._streams, rollout.under_way = [], []
        rollout.load_state(shared)
        found += [content(samples.gather()) for samples in self.begin(STREAMS["partial"], consumed)]
        return whole, found

    @property
    def consumed(self) -> int:
        """Batches that the stream has asked for."""
        return self.rollout._streams[0]._pool._count // TASKS

    def weights(self) -> list[Tensor]:
        return (
            [value.data.clone() for value in self.policy.engine.model.parameters.values()] if self.policy.member else []
        )

    def restore(self, weights: list[Tensor]) -> None:
        if self.policy.member:
            for value, kept in zip(self.policy.engine.model.parameters.values(), weights, strict=True):
                value.data.copy_(kept)


def advantages(reward_B: Tensor) -> Tensor:
    return torch.nan_to_num(reward_B - reward_B.nanmean())


def content(samples: Samples) -> list[Any]:
    """Everything of a row that training reads, in the order of the rows."""
    rows = []
    for row in range(samples.rows):
        length = int(samples.length_B[row])
        assert (
            samples.turn_BT is not None and samples.turn_reward_BT is not None and samples.rollout_logp_BT is not None
        )
        assert samples.episode_reward_B is not None and samples.episodes is not None
        rows.append(
            {
                "index": int(samples.prompt_index_B[row]),
                "prompt": int(samples.prompt_len_B[row]),
                "tokens": samples.tokens_BT[row, :length].tolist(),
                "turn": samples.turn_BT[row, :length].tolist(),
                "reward": repr(float(samples.episode_reward_B[row])),
                "turn_reward": samples.turn_reward_BT[row, :length].tolist(),
                "ended": samples.episodes[row]["ended"],
                "logp": samples.rollout_logp_BT[row, :length].tolist(),
            }
        )
    return rows


def failing(world: World, episodic: Episodic) -> str:
    """What a rank says when the source of the first one fails."""
    for source in episodic.sources:
        source.polls, source.fail_at = 0, ("poll", 3)
    try:
        episodic.rollout.play(next(episodic.batches()), SAMPLES)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for source in episodic.sources:
            source.fail_at = None
    return "nothing"


def run_episodes(world: World, task: Path, layout: list[str], scenes: list[str]) -> dict[str, Any]:
    """What is found, by what it is about. `task`: the folder of the tests' small task."""
    config = to_config(
        compose_config(
            [
                f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}", f"run_dir={task / 'run'}",
                "algorithm=grpo_decoupled", "algorithm.roles=[policy,rollout]", "train.eval_every=0", "data.shuffle=false",
                "sampling.max_tokens=8", "sampling.stop_token_ids=[4,14,24,34,44,54,64,74,84]", "rollout.kv_cache_mib=16", "rollout.max_model_len=128", "policy.optimizer.lr=3e-3", *layout,
            ],
            "quickstart",
        )
    )  # fmt: skip
    job = prepare(config, world.size)
    checked, sources = job.checked, []

    def make() -> Scripted:
        sources.append(Scripted(vocab=checked.spec.vocab))
        return sources[-1]

    episode_source.source_factory = lambda *arguments: make
    roles = build_roles(config, job.roles, world, checked.meshes, checked.spec, checked.tokenizer)
    episodic = Episodic(world, job, roles, sources)
    roles.policy.reshard_to(roles.rollout)
    results: dict[str, Any] = {"plain": episodic.played()}
    if "shuffled" in scenes:
        for seed in (1, 2):
            episodic.shuffled(seed)
            results[f"shuffled {seed}"] = episodic.played()
        episodic.shuffled(None)
    if "streams" in scenes:
        for name in STREAMS:
            results[f"stream, {name}"] = episodic.streamed(name)
    if "training" in scenes:
        for name in STREAMS:
            results[f"training, {name}"] = episodic.trained(name)
        for name in ("lag 0", "partial"):
            episodic.shuffled(7)
            results[f"training, {name}, shuffled"] = episodic.trained(name)
            episodic.shuffled(None)
    if "resume" in scenes:
        results["whole"], results["resumed"] = episodic.resumed()
    if "failing" in scenes:
        results["said"] = failing(world, episodic)
    return results
