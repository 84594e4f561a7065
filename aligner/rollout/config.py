"""Settings of generation: the vLLM engine, sampling, asynchronous generation (no torch, no vLLM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from aligner.bounds import AtLeast, AtMost, Between, MoreThan, OneOf, check_settings
from aligner.models.families import FAMILIES
from aligner.reshard.plan.region import ELEMENT_BYTES

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec

BLOCK_TOKENS = 32
"""Tokens in one block of the KV cache; the CPU kernels want multiples of 32, CUDA's take it too."""
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that the engine's CPU attention has kernels for."""
CPU_EXPERT_BLOCK = 32
"""The engine's CPU kernels for experts work on multiples of this many columns."""
VOCABULARY_BLOCK = 64
"""The engine rounds the embedding's rows up to a multiple of this, before it cuts them."""
UNSAID_LENGTH = 1024
"""Tokens in a sample where neither rollout.max_model_len nor a job's lengths say how many."""
CPU_KV_CACHE_LIMIT_MIB = 1024
"""Most that rollout.kv_cache_mib=null takes on a CPU, whose memory the training roles share."""


def padded_vocab(vocab: int) -> int:
    """Rows of the engine's embedding over all tensor ranks."""
    return -(-vocab // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


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
    """Settings of each replica's vLLM engine."""

    dtype: Annotated[str, OneOf(*ELEMENT_BYTES)] = "float32"
    """Weights, activations and KV cache: float32, bfloat16 or float16."""
    max_model_len: Annotated[int | None, AtLeast(2, "room for a response")] = None
    """Maximum tokens of one sample, prompt and response together. null: data.max_prompt_tokens + sampling.max_tokens, or
    the model's own maximum where that is less and the prompts are short enough for it."""
    max_num_seqs: Annotated[int, AtLeast(1)] = 128
    """Maximum number of samples that one replica generates concurrently; others are queued."""
    max_batched_tokens: int | None = None
    """Maximum tokens in one engine step; null: vLLM's default."""
    kv_cache_mib: Annotated[int | None, AtLeast(1)] = None
    """KV cache of each rank in MiB. null: on CUDA what gpu_memory_utilization leaves; on a CPU enough for
    max_num_seqs samples of max_model_len tokens, but no more than 1024."""
    gpu_memory_utilization: Annotated[float, MoreThan(0), AtMost(1)] = 0.4
    """CUDA, with kv_cache_mib=null: fraction of the device's memory for the engine, weights and KV cache together."""
    prefix_caching: bool = True
    """Prefix caching: samples of one prompt share its prefill; emptied at every weight sync."""
    enforce_eager: bool = False
    """CUDA: run without CUDA graphs (less memory, slower). A CPU always runs eagerly."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"rollout.max_batched_tokens={self.max_batched_tokens} is below rollout.max_num_seqs: samples take one "
                f"token each in a step; use {self.max_num_seqs} or more, or null."
            )

    def check_model(
        self, spec: ModelSpec, tensor: int, cpu: bool, expert_parallel: bool = False, pipeline: int = 1
    ) -> None:
        """Raises ValueError where the engine could not run this model over `tensor` x `pipeline` ranks."""
        check_settings(self, "rollout")
        if self.length(spec) > spec.max_positions:
            raise ValueError(
                f"rollout.max_model_len={self.max_model_len} is beyond the {spec.positions_text}; "
                f"use {spec.max_positions} or less."
            )
        if spec.tensors is not None:
            _check_unlisted(spec, tensor, pipeline, expert_parallel)
            if cpu and not spec.tensors.latent:
                _check_cpu(spec)
            if self.kv_cache_mib is not None:
                self._check_kv_cache(self.kv_cache_mib, spec, tensor, pipeline)
            return
        if expert_parallel and not spec.experts:
            raise ValueError(f"placement.rollout.expert={tensor}: the model in {spec.path} has no experts; use 1.")
        fits = [size for size in range(1, spec.heads + 1) if _divides(spec, size, expert_parallel)]
        if tensor not in fits:
            raise ValueError(
                f"placement.rollout.tensor={tensor} does not divide the model's {_widths(spec, expert_parallel)}; "
                f"use {', '.join(map(str, fits))}."
            )
        if spec.experts and tensor > spec.experts:
            raise ValueError(
                f"placement.rollout.tensor={tensor} is more than the {spec.experts} experts of the model in "
                f"{spec.path}; use {', '.join(str(size) for size in fits if size <= spec.experts)}."
            )
        _check_stages(spec, pipeline)
        if cpu:
            _check_cpu(spec)
        if spec.o_bias and not FAMILIES[spec.family].engine.output_bias:
            raise ValueError(
                f"the rollout engine ignores the bias of a {spec.family} model's attention output; use a model with "
                f"attention_bias=false ({spec.path}/config.json)."
            )
        if self.kv_cache_mib is not None:
            self._check_kv_cache(self.kv_cache_mib, spec, tensor, pipeline)

    def length(self, spec: ModelSpec) -> int:
        """max_model_len, or a usual length that the model can read."""
        return min(UNSAID_LENGTH, spec.max_positions) if self.max_model_len is None else self.max_model_len

    def kv_cache_bytes(self, spec: ModelSpec, tensor: int, cpu: bool, pipeline: int = 1) -> int | None:
        """The KV cache of each rank in bytes; None where the engine measures what is left (CUDA)."""
        if self.kv_cache_mib is not None:
            return self.kv_cache_mib << 20
        if not cpu:
            return None
        one = self._sequence_bytes(spec, tensor, pipeline)
        return max(one, min(one * self.max_num_seqs, CPU_KV_CACHE_LIMIT_MIB << 20))

    def _check_kv_cache(self, mib: int, spec: ModelSpec, tensor: int, pipeline: int) -> None:
        needed = math.ceil(self._sequence_bytes(spec, tensor, pipeline) / (1 << 20))
        if mib < needed:
            raise ValueError(
                f"rollout.kv_cache_mib={mib} cannot hold one sample of rollout.max_model_len={self.length(spec)} "
                f"tokens; use rollout.kv_cache_mib={needed} or more, or a smaller rollout.max_model_len."
            )

    def _sequence_bytes(self, spec: ModelSpec, tensor: int, pipeline: int) -> int:
        """KV cache of one sample of max_model_len tokens on one rank."""
        blocks = math.ceil(self.length(spec) / BLOCK_TOKENS) + 1  # the engine keeps one empty
        kv_heads = max(1, spec.kv_heads // tensor)
        return (
            blocks * BLOCK_TOKENS * 2 * (spec.layers // pipeline) * kv_heads * spec.head_dim * ELEMENT_BYTES[self.dtype]
        )


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


def _check_unlisted(spec: ModelSpec, tensor: int, pipeline: int, expert_parallel: bool) -> None:
    """Of a family without a table of its own only the heads are known to be divided."""
    fits = [size for size in range(1, spec.heads + 1) if spec.heads % size == 0]
    if tensor not in fits:
        raise ValueError(
            f"placement.rollout.tensor={tensor} does not divide the model's {spec.heads} attention heads; use "
            f"{', '.join(map(str, fits))}."
        )
    for name, given in (("pipeline", pipeline), ("expert", tensor if expert_parallel else 1)):
        if given > 1:
            raise ValueError(
                f"placement.rollout.{name}={given}: the sizes of a {spec.family} model's parts are not known ({spec.path}); use 1."
            )


def _check_stages(spec: ModelSpec, pipeline: int) -> None:
    """Stages of equal size: their ranks schedule for themselves, and must find room for equally many samples."""
    if spec.layers % pipeline:
        works = [size for size in range(1, spec.layers + 1) if spec.layers % size == 0]
        raise ValueError(
            f"placement.rollout.pipeline={pipeline} does not divide the {spec.layers} layers of the model in "
            f"{spec.path}; use {', '.join(map(str, works))}."
        )
    sparse_stages = {layer // (spec.layers // pipeline) for layer in spec.sparse_layers}
    if spec.experts and len(sparse_stages) < pipeline:
        raise ValueError(
            f"placement.rollout.pipeline={pipeline}: the engine wants experts in every stage of the model in "
            f"{spec.path}, and its sparse layers are {list(spec.sparse_layers)}; use fewer stages."
        )


def _check_cpu(spec: ModelSpec) -> None:
    if spec.head_dim not in CPU_HEAD_DIMS:
        raise ValueError(
            f"the rollout engine has no CPU attention for head_dim={spec.head_dim} (the model in {spec.path}); "
            f"use a model with head_dim {', '.join(map(str, CPU_HEAD_DIMS))}, or a GPU."
        )
    if spec.experts and spec.hidden % CPU_EXPERT_BLOCK:
        raise ValueError(
            f"the rollout engine has no CPU kernel for experts of a hidden size of {spec.hidden} (the model in "
            f"{spec.path}); use a model whose hidden size is a multiple of {CPU_EXPERT_BLOCK}, or a GPU."
        )


def _divides(spec: ModelSpec, tensor: int, expert_parallel: bool) -> bool:
    # Beyond its key-value heads the engine gives each rank a copy of one of them, of most families.
    shared = FAMILIES[spec.family].engine.shared_kv_heads and tensor % spec.kv_heads == 0
    kv = spec.kv_heads % tensor == 0 if tensor <= spec.kv_heads else shared
    dense = len(spec.sparse_layers) == spec.layers or spec.ffn % tensor == 0
    sparse = not spec.experts or expert_parallel or spec.expert_ffn % tensor == 0
    return spec.heads % tensor == 0 and kv and dense and sparse and padded_vocab(spec.vocab) % tensor == 0


def _widths(spec: ModelSpec, expert_parallel: bool) -> str:
    divided = [f"{spec.heads} attention heads", f"{spec.kv_heads} key-value heads"]
    if len(spec.sparse_layers) < spec.layers:
        divided.append(f"MLP width {spec.ffn}")
    if spec.experts and not expert_parallel:
        divided.append(f"expert width {spec.expert_ffn}")
    divided.append(f"{padded_vocab(spec.vocab)} rows of the embedding")
    return f"{', '.join(divided[:-1])} and {divided[-1]}"
