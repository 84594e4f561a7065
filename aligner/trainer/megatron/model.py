"""The Megatron GPTModel of a checkpoint on one rank of a role, with the regions that its parameters hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import EMBEDDING_PARAMETER, OUTPUT_PARAMETER
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import EXPERT_AXES, Mesh
from aligner.trainer.megatron.layers import HiddenStates, ScalarHead, block_spec, fuse_activations, scale_embedding
from aligner.trainer.megatron.layout import MegatronLayout, padded_vocab_size
from aligner.trainer.megatron.rotary import PackedRotary
from aligner.trainer.megatron.sizes import check_runs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model."""

    chunks: list[GPTModel]
    """One chunk, or this stage's chunks of a virtual pipeline, in the model's order."""
    rotary: PackedRotary
    """Shared by all chunks."""
    config: TransformerConfig
    layout: MegatronLayout
    """Which regions of which checkpoint tensors every rank's parameters hold."""
    rank: int
    """World rank."""

    def pieces(self) -> Sequence[Piece]:
        """The regions that this rank's parameters hold."""
        return self._pieces

    @cached_property
    def _pieces(self) -> Sequence[Piece]:
        return self.layout.layout(self.rank)

    def view(self, piece: Piece) -> Tensor:
        """A writable strided view of the parameter that holds `piece`."""
        return strided_view(self.parameters[piece.storage].data, piece)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by the layout's storage names."""
        prefixes = [f"chunk{number}." for number in range(len(self.chunks))] if len(self.chunks) > 1 else [""]
        return {
            f"{prefix}{name}": parameter
            for prefix, chunk in zip(prefixes, self.chunks, strict=True)
            for name, parameter in chunk.named_parameters()
        }

    @property
    def output_weight(self) -> torch.nn.Parameter | None:
        """[padded vocabulary / tensor, hidden] on the last stage, of the embedding where they are tied; None: a scalar head."""
        last = self.chunks[-1]
        if isinstance(last.output_layer, ScalarHead):
            return None
        tied: bool = last.share_embeddings_and_output_weights
        weight: Any = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
        return weight  # type: ignore[no-any-return]

    def train(self, training: bool = True) -> None:
        """Set training or evaluation mode."""
        for chunk in self.chunks:
            chunk.train(training)


def keep_values(weight: Tensor) -> Tensor:
    """An initialiser that does nothing: weights come from a checkpoint. `perform_initialization=False` would also skip setting
    the parameters' tensor-parallel attributes, and the gradient norm would be wrong."""
    return weight


def transformer_config(
    spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, sequence_parallel: bool, recompute: str
) -> TransformerConfig:
    """Megatron's configuration of this checkpoint under this mesh."""
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", *["moe"] * bool(spec.experts)]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        ffn_hidden_size=spec.ffn,
        kv_channels=spec.head_dim,
        softmax_scale=spec.attention_scale,
        layernorm_epsilon=spec.norm_eps,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm is not None,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[spec.activation],
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=keep_values,
        output_layer_init_method=keep_values,
        embedding_init_method=keep_values,
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        context_parallel_size=mesh.context,
        virtual_pipeline_model_parallel_size=mesh.virtual_pipeline if mesh.virtual_pipeline > 1 else None,
        sequence_parallel=sequence_parallel,
        # the loss is already divided by the global batch's denominators: gradients are summed, not averaged
        calculate_per_token_loss=True,
        variable_seq_lengths=mesh.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths requires it, for dense models too
        # batched p2p between the chunks of a virtual pipeline silently gives wrong numbers
        batch_p2p_comm=mesh.virtual_pipeline == 1,
        overlap_p2p_comm=mesh.virtual_pipeline > 1,
        batch_p2p_sync=False,  # a wait of the host for the device at every message, against a fault of old NCCLs
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **settings[recompute],
        **_expert_settings(spec, mesh),
    )


def _expert_settings(spec: ModelSpec, mesh: Mesh) -> dict[str, Any]:
    """MoE settings; the router as in transformers: float32, probabilities from the softmax over all experts."""
    if not spec.experts:
        return {}
    return {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_ffn,
        # renormalised top-k probabilities equal a softmax over the top-k logits
        "moe_router_pre_softmax": not spec.norm_topk,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": mesh.expert,
        "expert_tensor_parallel_size": mesh.expert_tensor,
    }


def build_model(
    spec: ModelSpec,
    mesh: Mesh,
    rank: int,
    groups: ProcessGroupCollection,
    device: torch.device,
    dtype: str,
    sequence_parallel: bool,
    recompute: str = "none",
    experts: str = "sequential",
) -> ShardedModel:
    """This rank's part of the model, with zero weights.

    Raises:
        ValueError: Megatron cannot run this model under this mesh.
    """
    check_runs(spec, mesh, sequence_parallel, cpu=device.type == "cpu")
    layout = MegatronLayout(spec, mesh, dtype, experts == "grouped")
    coordinates = mesh.coordinates(rank)
    expert_coordinates, stage = mesh.coordinates(rank, EXPERT_AXES), coordinates["pipeline"]
    rotary = PackedRotary(spec, device, DTYPES[dtype])
    chunks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_config(spec, mesh, DTYPES[dtype], sequence_parallel, recompute)
        model_parallel_cuda_manual_seed(
            1,
            tp_rank=coordinates["tensor"],
            ep_rank=expert_coordinates["expert"],
            etp_rank=expert_coordinates["expert_tensor"],
            force_reset_rng=True,
        )
        for number, layers in enumerate(layout.stages.chunks(stage)):
            block: Any = block_spec(spec, layers, groups.tp, experts == "grouped")
            gpt: Any = GPTModel(
                config,
                block,
                vocab_size=padded_vocab_size(spec, mesh.tensor),
                max_sequence_length=spec.max_positions,
                pre_process=layout.stages.is_first(stage, number),
                post_process=layout.stages.is_last(stage, number),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=spec.tied,
                pg_collection=groups,
                vp_stage=number if mesh.virtual_pipeline > 1 else None,
            )
            gpt.rotary_pos_emb = rotary
            fuse_activations(gpt, spec.activation)
            if gpt.post_process and spec.head is Head.SCALAR:  # replaces Megatron's output layer
                gpt.output_layer = ScalarHead(config, groups.tp)
            elif gpt.post_process:
                gpt.output_layer = HiddenStates(gpt.output_layer.weight, config, groups.tp)
            if gpt.pre_process and spec.embedding_scale != 1.0:
                factor = torch.tensor(spec.embedding_scale, dtype=DTYPES[dtype], device=device)
                gpt.embedding.register_forward_hook(partial(scale_embedding, factor))
            chunks.append(gpt.to(device))
    with torch.no_grad():
        for gpt in chunks:
            for parameter in gpt.parameters():
                parameter.zero_()  # padding rows of the vocabulary stay zero
    model = ShardedModel(chunks, rotary, config, layout, rank)
    _check_layout(model)
    return model


def _check_layout(model: ShardedModel) -> None:
    """Assert that Megatron's parameters have the layout's names and numbers of elements, apart from padding of the vocabulary."""
    elements = dict.fromkeys(model.parameters, 0)
    for piece in model.pieces():
        assert piece.storage in elements, f"{piece.storage} is in the layout, not in the model"
        elements[piece.storage] += piece.elements
    for name, parameter in model.parameters.items():
        padded = name.endswith((EMBEDDING_PARAMETER, OUTPUT_PARAMETER))
        fits = elements[name] == parameter.numel() or (padded and elements[name] < parameter.numel())
        assert fits, f"{name} has {parameter.numel()} elements, its layout {elements[name]}"
