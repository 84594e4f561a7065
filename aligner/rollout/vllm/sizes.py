"""What vLLM can run, and its KV cache, by arithmetic (no torch, no vLLM)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aligner.models.families import FAMILIES
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.rollout.quantization import SETTING, weight_bytes
from aligner.rollout.vllm.architectures import check_known

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.rollout.config import RolloutConfig
    from aligner.spmd.mesh import Mesh

BLOCK_TOKENS = 32
"""Tokens in one block of the KV cache; the CPU kernels want multiples of 32, CUDA's take it too. For latent attention (MLA) without
AMX vLLM takes 16 instead."""
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that the engine's CPU attention has kernels for."""
CPU_EXPERT_BLOCK = 32
"""The engine's CPU kernels for experts work on multiples of this many columns."""
VOCABULARY_BLOCK = 64
"""The engine rounds the embedding's rows up to a multiple of this, before it cuts them."""
WIDER_WINDOWS = ("cohere2", "cohere2_moe")
"""Families of which vLLM's classes add 1 to `sliding_window`, and transformers' do not."""
CPU_KV_CACHE_LIMIT_MIB = 1024
"""Most that rollout.kv_cache_mib=null takes on a CPU, whose memory the training roles share."""


def padded_vocab(vocab: int) -> int:
    """Rows of the engine's embedding over all tensor ranks."""
    return -(-vocab // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


def check_model(spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> None:
    """`check_runs` for a role's mesh, and that vLLM knows the model."""
    check_runs(config, spec, mesh.tensor, cpu, mesh.expert > 1, mesh.pipeline)
    if spec.tensors is not None:
        check_known(spec, mesh.tensor)
        _check_agreement(spec, config, cpu)


def bytes_per_rank(spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> float:
    """Weights and KV cache of a rank in bytes; on CUDA with kv_cache_mib=null the weights alone."""
    # experts are cut, or whole ones: as many weights
    weights = weight_bytes(spec, config) / (mesh.tensor * mesh.pipeline)
    cache = kv_cache_bytes(config, spec, mesh.tensor, cpu, mesh.pipeline) or 0
    return weights + cache


def check_runs(
    config: RolloutConfig, spec: ModelSpec, tensor: int, cpu: bool, expert_parallel: bool = False, pipeline: int = 1
) -> None:
    """Raises ValueError where vLLM could not run this model over `tensor` x `pipeline` ranks."""
    config.check_length(spec)
    if spec.tensors is None:
        _check_listed(spec, tensor, expert_parallel, pipeline)
    else:
        _check_unlisted(spec, tensor, expert_parallel, pipeline)
    if config.quantization != "none":
        check_quantization(config, spec, cpu)
    if cpu and (spec.tensors is None or not spec.tensors.latent):
        _check_cpu(spec)
    if config.kv_cache_mib is not None:
        _check_kv_cache(config, config.kv_cache_mib, spec, tensor, pipeline)


def _check_listed(spec: ModelSpec, tensor: int, expert_parallel: bool, pipeline: int) -> None:
    """Of a family of `FAMILIES`."""
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
    if spec.o_bias and not FAMILIES[spec.family].engine.output_bias:
        raise ValueError(
            f"the rollout engine ignores the bias of a {spec.family} model's attention output; use a model with "
            f"attention_bias=false ({spec.path}/config.json)."
        )


def _check_unlisted(spec: ModelSpec, tensor: int, expert_parallel: bool, pipeline: int) -> None:
    """Of any other family only the heads are known to be divided."""
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


def kv_cache_bytes(config: RolloutConfig, spec: ModelSpec, tensor: int, cpu: bool, pipeline: int = 1) -> int | None:
    """The KV cache of each rank in bytes; None where the engine measures what is left (CUDA)."""
    if config.kv_cache_mib is not None:
        return config.kv_cache_mib << 20
    if not cpu:
        return None
    one = _sequence_bytes(config, spec, tensor, pipeline)
    return max(one, min(one * config.max_num_seqs, CPU_KV_CACHE_LIMIT_MIB << 20))


def _check_kv_cache(config: RolloutConfig, mib: int, spec: ModelSpec, tensor: int, pipeline: int) -> None:
    needed = math.ceil(_sequence_bytes(config, spec, tensor, pipeline) / (1 << 20))
    if mib < needed:
        raise ValueError(
            f"rollout.kv_cache_mib={mib} cannot hold one sample of rollout.max_model_len={config.length(spec)} "
            f"tokens; use rollout.kv_cache_mib={needed} or more, or a smaller rollout.max_model_len."
        )


def _sequence_bytes(config: RolloutConfig, spec: ModelSpec, tensor: int, pipeline: int) -> int:
    """KV cache of one sample of max_model_len tokens on one rank."""
    blocks = math.ceil(config.length(spec) / BLOCK_TOKENS) + 1  # the engine keeps one empty
    kv_heads = max(1, spec.kv_heads // tensor)
    return (
        blocks * BLOCK_TOKENS * 2 * (spec.layers // pipeline) * kv_heads * spec.head_dim * ELEMENT_BYTES[config.dtype]
    )


def check_quantization(config: RolloutConfig, spec: ModelSpec, cpu: bool) -> None:
    """Raises ValueError where vLLM could not keep the model's projections in FP8."""
    if cpu:
        raise ValueError(
            f"{SETTING} is for GPUs: the engine's CPU has no kernel for it; use rollout.quantization=none."
        )
    if config.dtype == "float32":
        raise ValueError(
            f"{SETTING}: the engine's FP8 kernels compute with 16-bit activations, not rollout.dtype=float32; use "
            "rollout.dtype=bfloat16 or float16."
        )
    if spec.tensors is not None:
        raise ValueError(
            f"{SETTING}: which weights of a {spec.family} model are projections is not known ({spec.path}); use "
            "rollout.quantization=none."
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


def _check_agreement(spec: ModelSpec, config: RolloutConfig, cpu: bool) -> None:
    """What vLLM's classes of families beyond the table cannot compute, or compute otherwise than transformers'."""
    from aligner.models.transformers_model import read_config  # imported here: torch and transformers take seconds

    fields = read_config(spec.path, spec.head, spec.trust_remote_code)
    kinds, window = getattr(fields, "layer_types", None) or (), getattr(fields, "sliding_window", None)
    if cpu and "linear_attention" in kinds and hasattr(fields, "linear_num_value_heads"):
        raise ValueError(
            f"rollout.engine=vllm: gated delta nets ({spec.path}: linear_attention layers) have a CPU kernel in bfloat16 alone, for "
            "which vLLM repacks weights as it loads them, and no weight sync does; use rollout.engine=transformers."
        )
    if spec.family in WIDER_WINDOWS and "sliding_attention" in kinds and window and config.length(spec) > window:
        raise ValueError(
            f"rollout.max_model_len={config.length(spec)}: in texts longer than sliding_window={window} ({spec.path}) vLLM's "
            f"{spec.family} attends to one token more than transformers' model, which is trained; use {window} or less, or "
            "rollout.engine=transformers."
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
