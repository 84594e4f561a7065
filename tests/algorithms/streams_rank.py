"""One rank of the tests of streams: samples generated ahead, interrupted, met by new weights.

Arguments: the folder of the tests' small task, then overrides. What is found is printed; every rank must print the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.config import compose_config, to_config
from aligner.data.samples import Samples
from aligner.driver.job import Job, prepare
from aligner.objective.off_policy import decoupled_surrogate
from aligner.roles import Roles, build_roles
from aligner.rollout.arrivals import Arrivals
from aligner.rollout.config import StreamConfig
from aligner.spmd.ref import Ref
from aligner.spmd.world import World

BATCHES, PROMPTS, SAMPLES = 6, 4, 2
STREAMS = {
    "lag 0": StreamConfig(),
    "lag 1": StreamConfig(lag=1),
    "lag 2": StreamConfig(lag=2),
    "in flight": StreamConfig(lag=1, in_flight=True),
    "partial": StreamConfig(step_tokens=6),
    "partial, ahead": StreamConfig(step_tokens=6, lag=1),
}


class AfterTokens(Arrivals):
    """The policy is there when the engine has asked five times, so between two tokens of what it generates."""

    def announce(self, ranks: Collection[int]) -> Callable[[], bool]:
        there, asked = super().announce(ranks), iter(range(1000))
        return lambda: there() and next(asked) >= 5


class Streams:
    """Loops over the same prompts under different streams."""

    def __init__(self, world: World, job: Job, roles: Roles) -> None:
        self.world, self.job, self.policy, self.rollout = world, job, roles.policy, roles.rollout

    def batches(self) -> Iterator[list[Any]]:
        for number in range(BATCHES):
            yield self.job.checked.data.training[number * PROMPTS : (number + 1) * PROMPTS]

    def begin(self, config: StreamConfig, arrivals: type[Arrivals] = Arrivals) -> Iterator[Ref]:
        self.rollout.calls, self.rollout.overlap = 0, config
        self.rollout._arrivals = arrivals(self.world, f"{config}") if config.in_flight else None
        if config.step_tokens is None:  # the call's own lag counts
            self.rollout.overlap = replace(config, lag=7)
            return self.rollout.stream(self.batches(), SAMPLES, lag=config.lag)
        return self.rollout.stream(self.batches(), SAMPLES)

    def unchanged(self) -> None:
        """Whatever the stream, samples are those of `generate`."""
        self.policy.reshard_to(self.rollout)
        self.rollout.calls = 0
        self.say("plain", [content(self.rollout.generate(batch, SAMPLES).get()) for batch in self.batches()])
        for name, config in STREAMS.items():
            found = []
            for samples in self.begin(config):
                self.policy.reshard_to(self.rollout)
                found.append(content(samples.get()))
            self.say(name, found)

    def training(self, name: str, config: StreamConfig, arrivals: type[Arrivals] = Arrivals) -> None:
        """Weights change at every step. The policy's own log-probabilities under each version's weights, compared with
        the engine's on the tokens that this version drew."""
        policy, rollout = self.policy, self.rollout
        first = policy.version
        kept, staleness, seen = [self.weights()], [], []
        policy.reshard_to(rollout)
        for samples in self.begin(config, arrivals):
            advantage_B = policy.run(lambda s: torch.linspace(-1, 1, s.rows), samples)
            metrics = policy.update(decoupled_surrogate, samples, advantage_B=advantage_B).get()
            policy.reshard_to(rollout)
            staleness.append([metrics["staleness"], metrics["staleness_max"]])
            kept.append(self.weights())
            seen.append(samples)
        worst, wrong, versions = 0.0, 0.0, []
        for samples in seen:
            whole: Samples = samples.get()
            assert whole.version_BT is not None and whole.rollout_logp_BT is not None
            drawn = whole.version_BT[whole.mask_BT].unique().tolist()
            versions.append([version - first for version in drawn])
            for version, weights in enumerate(kept, start=first):
                self.restore(weights)
                logp_BT: Tensor = policy.logprobs(samples).get()
                gap_BT = (logp_BT - whole.rollout_logp_BT).abs()
                at_BT = whole.mask_BT & (whole.version_BT == version)
                if version in drawn:
                    worst = max(worst, float(gap_BT[at_BT].max()))
                other_BT = whole.mask_BT & (whole.version_BT != version)
                if other_BT.any():
                    wrong = max(wrong, float(gap_BT[other_BT].max()))
        self.say(name, {"staleness": staleness, "versions": versions, "worst": worst, "wrong": wrong})

    def weights(self) -> list[Tensor]:
        return [value.data.clone() for value in self.policy.model.parameters.values()] if self.policy.member else []

    def restore(self, weights: list[Tensor]) -> None:
        if self.policy.member:
            for value, kept in zip(self.policy.model.parameters.values(), weights, strict=True):
                value.data.copy_(kept)

    def say(self, what: str, found: Any) -> None:
        print(f"said {self.world.rank} {what}: {json.dumps(found)}\n", end="", flush=True)


def content(samples: Samples) -> list[Any]:
    """(prompt, response) of each row, in their order."""
    responses = [samples.response_tokens(row) for row in range(samples.rows)]
    return [[index, tokens] for index, tokens in zip(samples.prompt_index_B.tolist(), responses, strict=True)]


def main() -> None:
    task, layout = Path(sys.argv[1]), sys.argv[2:]
    world = World(100)
    config = to_config(
        compose_config(
            [
                f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}", f"run_dir={task / 'run'}",
                "algorithm=grpo_decoupled", "algorithm.roles=[policy,rollout]", "train.eval_every=0", "data.shuffle=false",
                "sampling.max_tokens=20", "sampling.stop_token_ids=[4,14,24,34,44,54,64,74,84]", "rollout.kv_cache_mib=16", "policy.optimizer.lr=3e-3", *layout,
            ],
            "quickstart",
        )
    )  # fmt: skip
    job = prepare(config, world.size)
    checked = job.checked
    roles = build_roles(config, job.roles, world, checked.meshes, checked.spec, checked.tokenizer)
    streams = Streams(world, job, roles)
    streams.unchanged()
    streams.training("training, lag 0", StreamConfig())
    streams.training("training, lag 2", StreamConfig(lag=2))
    streams.training("training, in flight", StreamConfig(lag=1, in_flight=True), AfterTokens)
    streams.training("training, partial", StreamConfig(step_tokens=6))
    world.leave()


if __name__ == "__main__":
    main()
