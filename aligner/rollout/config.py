"""Settings of generation: the engine, sampling, asynchronous generation (no torch, no vLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from aligner.bounds import AtLeast, AtMost, Between, MoreThan, OneOf, check_settings
from aligner.reshard.plan.region import ELEMENT_BYTES

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec

ENGINES = ("vllm", "transformers")
"""The rollout engines, the keys of `aligner.rollout.engines.BACKENDS`."""
ALONE, WHILE_OTHERS_LEAVE, BESIDE_OTHERS = 0.9, 0.8, 0.4
"""rollout.gpu_memory_utilization=null."""
UNSAID_LENGTH = 1024
"""Tokens in a sample where neither rollout.max_model_len nor a job's lengths say how many."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Log-probabilities are those of the distribution sampled from, after temperature, top-k and top-p."""

    temperature: Annotated[float, Between(0, 2)] = 1.0
    """Divides the logits, 0.01 to 2; 0 is greedy (log-probabilities are then those of temperature 1)."""
    max_tokens: Annotated[int, AtLeast(1)] = 256
    """Maximum tokens of a response; one that reaches it without a stop token is truncated."""
    top_p: Annotated[float, MoreThan(0), AtMost(1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability; 1: all tokens."""
    top_k: Annotated[int, AtLeast(0, "0: all tokens")] = 0
    """Sample from this many most likely tokens; 0: all tokens."""
    stop_token_ids: Annotated[tuple[int, ...] | None, AtLeast(0)] = None
    """Tokens that end a response, which includes them; null: every token that ends a turn by the model's own files
    (config.json, generation_config.json), its tokenizer, its chat template or the answers that are trained on."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if 0.0 < self.temperature < 0.01:
            raise ValueError(
                f"sampling.temperature={self.temperature} is lower than the engine takes; use 0 (greedy) or 0.01 to 2."
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of each replica's engine."""

    engine: Annotated[str, OneOf(*ENGINES)] = "vllm"
    """Rollout engine: vllm, or transformers (the model's own class in the transformers library with a KV cache: slower, whole
    on each rank; for models that vLLM does not run, and to measure vLLM's log-probabilities against)."""
    dtype: Annotated[str, OneOf(*ELEMENT_BYTES)] = "float32"
    """Weights, activations and KV cache: float32, bfloat16 or float16."""
    max_model_len: Annotated[int | None, AtLeast(2, "room for a response")] = None
    """Maximum tokens of one sample, prompt and response together. null: data.max_prompt_tokens + sampling.max_tokens, or
    the model's own maximum where that is less and the prompts are short enough for it."""
    max_num_seqs: Annotated[int, AtLeast(1)] = 128
    """Maximum number of samples that one replica generates concurrently; others are queued. With engine=transformers this
    bounds the KV cache, which grows with its samples."""
    max_batched_tokens: int | None = None
    """Maximum tokens in one engine step; null: vLLM's default. engine=transformers: of prompts in one forward pass; null:
    8192."""
    kv_cache_mib: Annotated[int | None, AtLeast(1)] = None
    """vLLM's KV cache of each rank in MiB. null: on CUDA what gpu_memory_utilization leaves; on a CPU enough for
    max_num_seqs samples of max_model_len tokens, but no more than 1024."""
    gpu_memory_utilization: Annotated[float | None, MoreThan(0), AtMost(1)] = None
    """vLLM on CUDA, with kv_cache_mib=null: fraction of the device's memory for the engine, weights and KV cache together.
    null: 0.9 on ranks of its own, 0.8 beside roles that leave the device while it generates (residency.mode=auto or offload),
    0.4 beside roles that stay."""
    prefix_caching: bool = True
    """vLLM's prefix caching: samples of one prompt share its prefill; emptied at every weight sync. engine=transformers always
    shares it among samples that start together."""
    enforce_eager: bool = False
    """vLLM on CUDA: run without CUDA graphs (less memory, slower). A CPU always runs eagerly."""
    suspend_communicators: bool = False
    """vLLM on CUDA, on several ranks a replica: while the whole engine is away (residency), NCCL gives back the buffers of vLLM's
    communicator too, and makes them again when it comes back (ncclCommSuspend; vLLM calls it experimental)."""
    quantization: Annotated[str, OneOf("none", "fp8")] = "none"
    """vLLM on CUDA, with a 16-bit dtype: fp8 keeps the projections of attention, MLPs and experts as float8_e4m3fn with a scale for
    each block of 128 x 128, and multiplies them by activations that are cast alike; a weight sync sends a byte for each weight.
    Every rank of policy and rollout must hold whole blocks. The rollout's log-probabilities then differ from the policy's by more
    than rounding. none: all weights have `dtype`."""
    share_policy_weights: bool = False
    """engine=transformers: generate with the policy's own weights, without a copy of them and without weight syncs. For
    policy.engine=fsdp where each rank of the rollout holds the whole policy: one rank, or one rank per replica."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.share_policy_weights and self.engine != "transformers":
            raise ValueError(
                f"rollout.share_policy_weights=true: engine={self.engine} computes with weights in a layout of its own; use "
                "rollout.engine=transformers, or share_policy_weights=false."
            )
        if self.quantization != "none" and self.engine != "vllm":
            raise ValueError(
                f"rollout.quantization={self.quantization}: engine={self.engine} computes in rollout.dtype alone; use "
                "rollout.engine=vllm, or quantization=none."
            )
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"rollout.max_batched_tokens={self.max_batched_tokens} is below rollout.max_num_seqs: samples take one "
                f"token each in a step; use {self.max_num_seqs} or more, or null."
            )

    def check_length(self, spec: ModelSpec) -> None:
        """Raises ValueError for impossible settings, and a length that the model cannot read."""
        check_settings(self, "rollout")
        if self.length(spec) > spec.max_positions:
            raise ValueError(
                f"rollout.max_model_len={self.max_model_len} is beyond the {spec.positions_text}; "
                f"use {spec.max_positions} or less."
            )

    def length(self, spec: ModelSpec) -> int:
        """max_model_len, or a usual length that the model can read."""
        return min(UNSAID_LENGTH, spec.max_positions) if self.max_model_len is None else self.max_model_len


@dataclass(frozen=True)
class StreamConfig:
    """Asynchronous generation, in loops that use `rollout.stream` (all but ReMax)."""

    lag: Annotated[int, AtLeast(0, "0: on-policy")] = 0
    """Number of batches generated ahead of the one trained on. 0: on-policy. 1: a rollout on separate ranks generates
    while the policy trains, and each batch is sampled with the weights before the last update."""
    in_flight: bool = False
    """With lag > 0: new weights are loaded as soon as the policy has them, between two decoding steps of running requests,
    whose KV cache is then recomputed. false: a batch is sampled with one version of the weights."""
    step_tokens: Annotated[int | None, AtLeast(1)] = None
    """Partial rollouts: maximum tokens that a step adds to a response; unfinished responses continue in the next step, with
    the newer weights. null: every response is completed in its step."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.in_flight and not self.lag:
            raise ValueError(
                "stream.in_flight=true changes weights under what is generated ahead; set stream.lag=1 or more."
            )
