"""What ranks do in the tests of streams: samples generated ahead, interrupted, met by new weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.config.schema import compose_config, to_config
from aligner.data.samples import Samples
from aligner.objective.off_policy import decoupled_surrogate
from aligner.roles.build import Roles, build_roles
from aligner.rollout.arrivals import Arrivals
from aligner.rollout.config import StreamConfig
from aligner.run.job import Job
from aligner.run.prepare import prepare
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
    "partial, two ahead": StreamConfig(step_tokens=6, lag=2),
}
BOUNDS = [(lag, step_tokens) for lag in (0, 1, 2) for step_tokens in (20, 10, 5)]
"""Of responses of 20 tokens, which take 1, 2 and 4 rounds."""
LONG, PAUSE = 150, 0.005
"""Tokens of a response that new weights meet before its end; seconds that the engine rests after each, as if it were a
larger one's: this one could be done before an update is, on a busy machine."""


class AfterTokens(Arrivals):
    """The policy is there when the engine has asked five times, so between two tokens of what it generates."""

    def announce(self, ranks: Collection[int]) -> Callable[[], bool]:
        there, asked = super().announce(ranks), iter(range(1000))
        return lambda: there() and next(asked) >= 5


class Streams:
    """Loops over the same prompts under different streams."""

    def __init__(self, world: World, job: Job, roles: Roles) -> None:
        self.world, self.job, self.policy, self.rollout = world, job, roles.policy, roles.rollout
        self.begun = itertools.count()
        self.results: dict[str, Any] = {}

    def batches(self) -> Iterator[list[Any]]:
        for number in range(BATCHES):
            yield self.job.checked.data.training[number * PROMPTS : (number + 1) * PROMPTS]

    def begin(self, config: StreamConfig, arrivals: type[Arrivals] = Arrivals) -> Iterator[Ref]:
        self.rollout.calls, self.rollout.overlap = 0, config
        # a name of its own: counts of another stream's would say that the policy is there already
        self.rollout._arrivals = arrivals(self.world, f"stream {next(self.begun)}") if config.in_flight else None
        if config.step_tokens is None:  # the call's own lag counts
            self.rollout.overlap = replace(config, lag=7)
            return self.rollout.stream(self.batches(), SAMPLES, lag=config.lag)
        return self.rollout.stream(self.batches(), SAMPLES)

    def unchanged(self) -> None:
        """Whatever the stream, samples are those of `generate`."""
        self.policy.reshard_to(self.rollout)
        self.rollout.calls = 0
        self.say("plain", [content(self.rollout.generate(batch, SAMPLES).gather()) for batch in self.batches()])
        for name, config in STREAMS.items():
            found = []
            for samples in self.begin(config):
                self.policy.reshard_to(self.rollout)
                found.append(content(samples.gather()))
            self.say(name, found)

    def training(self, name: str, config: StreamConfig, arrivals: type[Arrivals] = Arrivals) -> None:
        """Weights change at every step. The policy's own log-probabilities under each version's weights, compared with
        the engine's on the tokens that this version drew."""
        policy, rollout = self.policy, self.rollout
        first = policy.version
        kept, staleness, seen = [self.weights()], [], []
        policy.reshard_to(rollout)
        for samples in self.begin(config, arrivals):
            advantage_B = policy.map(rising, samples)
            metrics = policy.update(decoupled_surrogate, samples, advantage_B=advantage_B).gather()
            policy.reshard_to(rollout)
            staleness.append([metrics["staleness"], metrics["staleness_max"]])
            kept.append(self.weights())
            seen.append(samples)
        worst, wrong, versions = 0.0, 0.0, []
        for samples in seen:
            whole: Samples = samples.gather()
            assert whole.version_BT is not None and whole.rollout_logp_BT is not None
            drawn = whole.version_BT[whole.mask_BT].unique().tolist()
            versions.append([version - first for version in drawn])
            for version, weights in enumerate(kept, start=first):
                self.restore(weights)
                logp_BT: Tensor = policy.logprobs(samples).gather()
                gap_BT = (logp_BT - whole.rollout_logp_BT).abs()
                at_BT = whole.mask_BT & (whole.version_BT == version)
                if version in drawn:
                    worst = max(worst, float(gap_BT[at_BT].max()))
                other_BT = whole.mask_BT & (whole.version_BT != version)
                if other_BT.any():
                    wrong = max(wrong, float(gap_BT[other_BT].max()))
        self.say(name, {"staleness": staleness, "versions": versions, "worst": worst, "wrong": wrong})

    def bounds(self, name: str, streams: list[tuple[int, int]], stop: Collection[int]) -> None:
        """[batches under way at the most, updates that the oldest token handed out had missed] of each (lag, step_tokens)."""
        policy, rollout, usual = self.policy, self.rollout, self.rollout.sampling
        rollout.sampling = replace(usual, stop_token_ids=tuple(stop))
        found = []
        for lag, step_tokens in streams:
            asked: list[int] = []

            def prompts(asked: list[int] = asked) -> Iterator[list[Any]]:
                for number in range(30):
                    asked.append(number)
                    yield self.job.checked.data.training[2 * number : 2 * number + 2]

            rollout.calls, rollout.overlap = 0, StreamConfig(lag=lag, step_tokens=step_tokens)
            policy.reshard_to(rollout)
            under_way, ages = 0, []
            for step, samples in zip(range(7), rollout.stream(prompts(), 2), strict=False):
                under_way = max(under_way, len(asked) - step)
                whole: Samples = samples.gather()
                assert whole.version_BT is not None
                ages.append(policy.version - int(whole.version_BT[whole.mask_BT].min()))
                policy.version += 1  # as an update would
                policy.reshard_to(rollout)
            rollout.drain_before_sync(policy.mesh)
            rollout.under_way.clear()
            found.append([under_way, max(ages)])
        rollout.sampling = usual
        self.say(name, found)

    def long(self, name: str, folder: Path) -> None:
        """New weights reach the engine whenever the policy has them, in the middle of long responses; transformers'
        log-probabilities under each version's weights, as exported, beside the engine's."""
        policy, rollout, usual = self.policy, self.rollout, self.rollout.sampling
        rollout.sampling = replace(usual, max_tokens=LONG, stop_token_ids=())
        policy.save_checkpoint(folder / f"{policy.version}")
        first, seen = policy.version, []
        if rollout.member:
            rollout.engine.requests.progress = lambda: time.sleep(PAUSE)
        policy.reshard_to(rollout)
        for samples in self.begin(StreamConfig(lag=1, in_flight=True)):
            policy.update(decoupled_surrogate, samples, advantage_B=policy.map(rising, samples))
            policy.reshard_to(rollout)
            policy.save_checkpoint(folder / f"{policy.version}")
            seen.append(samples.gather())
        rollout.sampling = usual
        mixed, worst, wrong, versions = 0, 0.0, 0.0, set()
        for whole in seen:
            version_BT, mask_BT = whole.version_BT, whole.mask_BT
            mixed += sum(len(row[mask].unique()) > 1 for row, mask in zip(version_BT, mask_BT, strict=True))
            drawn = version_BT[mask_BT].unique().tolist()
            versions |= {version - first for version in drawn}
            for version in drawn:
                gap_BT = (transformers_logp(folder / f"{version}", whole) - whole.rollout_logp_BT).abs()
                worst = max(worst, float(gap_BT[mask_BT & (version_BT == version)].max()))
                others_BT = mask_BT & (version_BT != version)
                wrong = max(wrong, float(gap_BT[others_BT].max()) if others_BT.any() else 0.0)
        self.say(name, {"mixed": mixed, "versions": sorted(versions), "worst": worst, "wrong": wrong})

    def weights(self) -> list[Tensor]:
        return (
            [value.data.clone() for value in self.policy.engine.model.parameters.values()] if self.policy.member else []
        )

    def restore(self, weights: list[Tensor]) -> None:
        if self.policy.member:
            for value, kept in zip(self.policy.engine.model.parameters.values(), weights, strict=True):
                value.data.copy_(kept)

    def say(self, what: str, found: Any) -> None:
        self.results[what] = found


def rising(samples: Samples) -> Tensor:
    return torch.linspace(-1, 1, samples.rows)


@torch.no_grad()
def transformers_logp(folder: Path, samples: Samples) -> Tensor:
    """[B, T] the log-probability of each token given those before it; 0 for the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_BT = samples.tokens_BT
    attended_BT = torch.arange(tokens_BT.shape[1]) < samples.length_B[:, None]
    logits_BTV = model(input_ids=tokens_BT, attention_mask=attended_BT.long()).logits.double()
    logp_BT = logits_BTV[:, :-1].log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logp_BT, (1, 0))


def content(samples: Samples) -> list[Any]:
    """(prompt, response) of each row, in their order."""
    responses = [samples.response_tokens(row) for row in range(samples.rows)]
    return [[index, tokens] for index, tokens in zip(samples.prompt_index_B.tolist(), responses, strict=True)]


def run_streams(world: World, task: Path, layout: list[str]) -> dict[str, Any]:
    """What is found, by what it is about; the same on every rank. `task`: the folder of the tests' small task."""
    config = to_config(
        compose_config(
            [
                f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}", f"run_dir={task / 'run'}",
                "algorithm=grpo_decoupled", "algorithm.roles=[policy,rollout]", "train.eval_every=0", "data.shuffle=false",
                "sampling.max_tokens=20", "sampling.stop_token_ids=[4,14,24,34,44,54,64,74,84]", "rollout.kv_cache_mib=16", f"rollout.max_model_len={LONG + 32}", "policy.optimizer.lr=3e-3", *layout,
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
    streams.training("training, partial, ahead", StreamConfig(step_tokens=6, lag=1))
    streams.bounds("bounds, equal lengths", BOUNDS, ())
    streams.bounds("bounds, unequal lengths", BOUNDS[2::3], config.sampling.stop_token_ids or ())
    streams.long("training, in flight, long", task / "versions")
    return streams.results
