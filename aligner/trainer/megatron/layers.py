"""Megatron layer specs of a model: norms, biases, dense MLP or experts, attention, the scalar head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from aligner.models.family import Norms
from aligner.models.spec import LayerType, ModelSpec, QKNorm
from aligner.models.tensors import family_of
from aligner.trainer.fused import gated, rms_norm, rms_norm_plus_one
from aligner.trainer.megatron.attention import (
    KeptTokens,
    PackedAttention,
    RotarySelfAttention,
    SharedHeadAttention,
)
from aligner.trainer.megatron.cpu import parameter_device
from aligner.trainer.megatron.grouped_experts import GroupedExperts
from aligner.trainer.megatron.rotary import rotary_slice
from aligner.trainer.megatron.versions import submodules_of, use_experts


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019); marked so that Megatron sums its gradient
    under sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(RMSNorm):
    """`rms_norm_plus_one`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return rms_norm_plus_one(x, self.weight, self.eps)


class ProjectionNorm(RMSNorm):
    """OLMo 2's RMSNorm of queries or keys over all heads, which are split over tensor-parallel ranks.

    Every rank holds the complete weight and uses its heads' part; Megatron sums the gradients of query and key norms over
    the tensor-parallel ranks, so each rank gets the complete gradient.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, heads: int, group: Any) -> None:
        super().__init__(config, heads * hidden_size, eps)
        self.heads, self.group = heads, group

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, local heads, head_dim] -> the same. With more ranks than key/value heads, several ranks hold the same one."""
        local_heads = x.shape[2]
        copies = local_heads * self.group.size() // self.heads
        square = x.float().pow(2).sum((-2, -1), keepdim=True)
        if self.group.size() > 1:  # all-reduced forward and backward: each rank's sum enters every rank's output
            square = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(square, self.group), self.group
            )
        first = self.group.rank() // copies * local_heads
        weight = self.weight.view(self.heads, -1)[first : first + local_heads].float()
        scaled = x.float() * torch.rsqrt(square / copies / self.weight.numel() + self.eps)
        return (scaled * weight).type_as(x)


class DecoderLayer(TransformerLayer):
    """A layer that may normalise the outputs of attention or MLP before adding the residual. The model's last layer goes on with
    the kept tokens alone after its attention (see `KeptTokens`): nobody uses the others' final hidden states."""

    def __init__(self, *args: Any, norm: type[RMSNorm], norms: Norms, last: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept_K: Tensor | None = None
        """During a forward of the last layer."""
        config = self.config
        if norms.after_attention:
            self.post_attention_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
            self.self_attn_bda = partial(_add_normed, self.post_attention_norm)
        if norms.after_mlp:
            self.post_mlp_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
            self.mlp_bda = partial(_add_normed, self.post_mlp_norm)
        if norms.after_attention or norms.after_mlp:
            # Megatron enables gradients here, for fused functions that it compiles; the norms would keep their inputs
            self.bias_dropout_add_exec_handler = nullcontext  # type: ignore[assignment]
        self.last = last
        if last:
            self.self_attn_bda = partial(self._add_to_kept, self.self_attn_bda)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[T, 1, hidden] -> the same, or [K, 1, hidden]; the keyword `packed_seq_params`: `KeptTokens`, or None for all."""
        kept: KeptTokens | None = kwargs.get("packed_seq_params")
        self.kept_K = kept.kept_K if self.last and kept else None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.kept_K = None

    def _add_to_kept(self, bias_dropout_add: Any, *settings: Any) -> Any:
        """Megatron's bias-dropout-add after attention, with the kept tokens' residual."""
        add = bias_dropout_add(*settings)

        def add_to_kept(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            if self.kept_K is not None:
                residual = residual.index_select(0, self.kept_K)
            added: Tensor = add(output, residual, dropout)
            return added

        return add_to_kept


def _add_normed(norm: RMSNorm, *_: Any) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Replaces Megatron's bias-dropout-add (dropout is 0)."""

    def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        out, bias = output
        return residual + norm(out if bias is None else out + bias)

    return add


class BiasedColumns(ColumnParallelLinear):
    """A projection with a bias, whatever `TransformerConfig.add_bias_linear` says."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRows(RowParallelLinear):
    """A projection with a bias, whatever `TransformerConfig.add_bias_linear` says."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class ScalarHead(nn.Module):
    """One number per token instead of logits; computed in float32, since the spacing of bfloat16 numbers near 10 is 0.06.

    Replicated on the tensor-parallel ranks, which all compute the same loss. Under sequence parallelism each rank computes
    its own tokens' outputs and all-gathers these, not the hidden states; its weight gradient covers its tokens only and is
    summed like a norm's.
    """

    def __init__(self, config: Any, group: Any) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, config.sequence_parallel
        self.weight = nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=parameter_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, weight: None = None, runtime_gather_output: bool | None = None) -> Any:
        """[T / tensor or T, 1, hidden] -> ([T, 1, 1] float32, None), as Megatron calls its output layer."""
        out = F.linear(hidden_states.float(), self.weight.float())
        if self.sequence_parallel:  # not reduced in backward: every rank has the complete gradient of the outputs
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.group)
        return out, None


class HiddenStates(nn.Module):
    """In place of Megatron's output layer, whose weight it holds: the model's output are its final hidden states, of which
    `output_logprobs` makes logits block by block. Under sequence parallelism they are gathered, and their gradients, of which
    each tensor rank has its shard of the vocabulary's, are summed and scattered.
    """

    def __init__(self, weight: nn.Parameter | None, config: Any, group: Any) -> None:
        """`weight`: None where the embedding on the same stage is the output layer too."""
        super().__init__()
        self.weight = weight
        self.group, self.sequence_parallel = group, config.sequence_parallel

    def forward(self, hidden_states: Tensor, weight: Any = None, runtime_gather_output: bool | None = None) -> Any:
        """[T / tensor or T, 1, hidden] -> ([T, 1, hidden], None), as Megatron calls its output layer."""
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.group)
        return hidden_states, None


def fuse_activations(model: nn.Module, activation: str) -> None:
    """Let each MLP, experts among them, take its activation from `gated`. Not a class of its own in the layer's spec, because
    Megatron gives its process group to an `MLP` only."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.forward = partial(_gated_mlp, module, activation)  # type: ignore[method-assign]


def _gated_mlp(
    mlp: Any, activation: str, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """(output, bias to be added), as `MLP.forward`; `per_token_scale` are an expert's routing probabilities."""
    both, bias = mlp.linear_fc1(hidden_states)
    inner = gated(both if bias is None else both + bias, activation)
    if per_token_scale is not None:
        inner = (inner * per_token_scale.unsqueeze(-1)).to(inner.dtype)
    out, bias = mlp.linear_fc2(inner)
    assert per_token_scale is None or bias is None, "no family has experts with biases"
    return out, bias


def scale_embedding(factor: Tensor, _: nn.Module, __: Any, embedded: Tensor) -> Tensor:
    """A forward hook of the embedding, with `factor` bound (in the weights' data type, as in transformers)."""
    return embedded * factor


def block_spec(spec: ModelSpec, layers: Sequence[int], group: Any, grouped: bool = False) -> TransformerBlockSubmodules:
    """Megatron's specs of these layers (numbered over the whole model), for the tensor-parallel group `group`; `grouped`: with
    `GroupedExperts`."""
    kinds = [(spec.layer_types[number], number == spec.layers - 1) for number in layers]
    specs = {(name, last): _layer_spec(spec, spec.types[name], group, last, grouped) for name, last in set(kinds)}
    norm: Any = _norm(spec)  # a class, where Megatron says a module
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


def _norm(spec: ModelSpec) -> type[RMSNorm]:
    return RMSNormPlusOne if spec.norm_plus_one else RMSNorm


def _layer_spec(spec: ModelSpec, layer_type: LayerType, group: Any, last: bool, grouped: bool) -> ModuleSpec:
    layer = copy.deepcopy(
        get_gpt_layer_local_spec(
            normalization="RMSNorm",
            qk_layernorm=spec.qk_norm is not None,
            num_experts=spec.experts if layer_type.sparse else None,
        )
    )
    parts: Any = layer.submodules
    norm, norms = _norm(spec), family_of(spec).norms
    parts.input_layernorm = norm if norms.before_attention else IdentityOp
    parts.pre_mlp_layernorm = norm if norms.before_mlp else IdentityOp
    layer.module, layer.params = DecoderLayer, {"norm": norm, "norms": norms, "last": last}
    parts.self_attention.module = SharedHeadAttention if group.size() > spec.kv_heads else RotarySelfAttention
    parts.self_attention.params["rotary"] = rotary_slice(spec, layer_type.rope)
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(PackedAttention, params={"window": layer_type.window, "last": last})
    if spec.qk_norm is QKNorm.HEAD:
        attention.q_layernorm = attention.k_layernorm = norm
    elif spec.qk_norm is QKNorm.PROJECTION:
        assert norm is RMSNorm, "no family normalises whole projections by 1 + weight"
        attention.q_layernorm = ModuleSpec(ProjectionNorm, params={"heads": spec.heads, "group": group})
        attention.k_layernorm = ModuleSpec(ProjectionNorm, params={"heads": spec.kv_heads, "group": group})
    if spec.o_bias:
        attention.linear_proj = BiasedRows
    if grouped and layer_type.sparse:
        use_experts(parts.mlp, GroupedExperts, activation=spec.activation)
    if spec.mlp_bias and not layer_type.sparse:
        mlp = submodules_of(parts.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = BiasedColumns, BiasedRows
    return layer
