"""`RolloutEngine`: the interface of a rollout engine. One engine is one replica of one role, on this rank.

The role, streams, checkpoints of what is under way, the weight sync and residency are written against this class alone; an
engine (vLLM in `rollout/vllm/`, the transformers library in `rollout/transformers/`) implements it and is entered in
`rollout/engines.py`.

Determinism: sample i of a prompt is drawn with seed `seeds[prompt] + i` and nothing else. The other prompts, their order, the
replica and the process's random states have no part in it, but for rounding: logits of other batches differ in the last bits
(not with vLLM on a CPU: see `rollout/vllm/cpu_single_rows.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.bounds import check_settings
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.requests import Requests, Sample
from aligner.spmd.residency import Kind

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.reshard.plan.layout import WeightLayout
    from aligner.reshard.weights import WritableWeights
    from aligner.rollout.loaded import LoadedWeights
    from aligner.spmd.memory import Meter
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part

T = TypeVar("T")
SharedTensors = Callable[[str], Tensor]
"""Name of a parameter or buffer in transformers' model -> the policy's own memory of it, whole."""

KINDS = {"weights": Kind(lost=True), "cache": Kind()}
"""What an engine holds that can leave the device: weights, which the next sync writes anew, and the KV cache."""


class RolloutEngine(ABC):
    """Token ids in, sampled token ids and their log-probabilities out.

    Every rank of the replica makes every call with equal arguments. The engine starts without weights: a sync writes
    `weights`, and `loaded` says whether it has. `requests.progress` is called after each decoding step: the watchdog takes a
    rank without progress for hung.
    """

    spec: ModelSpec
    config: RolloutConfig
    device: torch.device
    loaded: LoadedWeights
    """Which weights the engine holds."""
    requests: Requests
    """What is being generated."""

    # ---- construction

    @classmethod
    @abstractmethod
    def build(
        cls,
        spec: ModelSpec,
        mesh: Mesh,
        group: dist.ProcessGroup,
        ident: str,
        config: RolloutConfig,
        device: torch.device,
        *,
        layout: WeightLayout,
        sleeps: bool,
        loaded: LoadedWeights,
        shared: SharedTensors | None = None,
    ) -> Self:
        """An engine without weights; collective over `group`.

        Args:
            group: this rank's replica.
            ident: names the replica among this host's.
            layout: what every rank of the role holds.
            sleeps: weights and cache must be able to leave the device (`parts`).
            loaded: the role's record of which weights its engines hold.
            shared: the policy's own tensors, which the engine computes with (`config.share_policy_weights`).

        Raises:
            ValueError: settings and model do not go together.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the engine; collective over the replica. The process can then make another one."""

    # ---- weights

    @property
    @abstractmethod
    def weights(self) -> WritableWeights:
        """This rank's part of the weights, as the destination of a sync."""

    @abstractmethod
    def new_weights(self) -> None:
        """Forget every KV cache entry, all of which the weights before computed; what is under way is read anew."""

    @abstractmethod
    def parts(self, meter: Meter) -> Mapping[str, Part]:
        """The `KINDS` on this rank's device; of an engine that was built to sleep."""

    # ---- generation

    @abstractmethod
    def resume(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Take samples into work that may have been begun before; see `Requests.start`.

        Returns:
            What `finish` takes.

        Raises:
            RuntimeError: the engine has no valid weights.
        """

    @abstractmethod
    def finish(self, ticket: int) -> list[Sample]:
        """Generate until the samples of one `start` or `resume` are there, in its order."""

    @abstractmethod
    def work_until(self, enough: Callable[[], bool]) -> None:
        """Generate until `enough()`, asked on the replica's first rank before each token, or until nothing is left."""

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """The surroundings in which `requests` may be started and advanced by hand."""

    @abstractmethod
    def from_first(self, value: T) -> T:
        """What the replica's first rank gives, on all of its ranks; collective over the replica."""

    def start(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> int:
        """Take `num_samples` responses to each prompt into work; see `generate`. Returns what `finish` takes."""
        assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
        assert num_samples >= 1, f"num_samples={num_samples}"
        self.check(prompts, sampling)
        return self.resume(
            [Sample(list(p), seed + i) for p, seed in zip(prompts, seeds, strict=True) for i in range(num_samples)],
            sampling,
        )

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Sample]]:
        """`num_samples` responses to each prompt, in the order of the prompts.

        Sample i of a prompt is drawn with seed `seeds[prompt] + i`. Space the seeds accordingly.

        Raises ValueError where a prompt is empty or does not fit, RuntimeError where the engine has no valid weights.
        """
        drawn = 1 if sampling.temperature == 0 else num_samples  # greedy samples are all the same
        samples = self.finish(self.start(prompts, seeds, sampling, drawn))
        groups = [samples[first : first + drawn] for first in range(0, len(samples), drawn)]
        return [group * (num_samples // drawn) for group in groups]

    def check(self, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        """Raises ValueError for settings that cannot be, and where a prompt is empty, foreign or does not fit."""
        check_settings(sampling, "sampling")
        longest = max((len(prompt) for prompt in prompts), default=0)
        needed = longest + sampling.max_tokens
        if prompts and needed > self.config.length(self.spec):
            limit = self.spec.max_positions
            remedy = f"use rollout.max_model_len={needed} or more" if needed <= limit else f"the model ends at {limit}"
            raise ValueError(
                f"a prompt of {longest} tokens and sampling.max_tokens={sampling.max_tokens} do not fit in "
                f"rollout.max_model_len={self.config.length(self.spec)}; {remedy}, or shorter prompts or responses."
            )
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(
                    f"prompt {index} is empty; give it at least one token, such as the begin-of-text token."
                )
            if min(prompt) < 0 or max(prompt) >= self.spec.vocab:
                strange = max(prompt) if min(prompt) >= 0 else min(prompt)
                raise ValueError(
                    f"prompt {index} holds token {strange}, outside the model's vocabulary of {self.spec.vocab}; "
                    f"use the tokenizer of {self.spec.path}."
                )
