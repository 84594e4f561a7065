"""Build the Megatron GPT model of a checkpoint for one rank of a role, and say which regions it holds."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aligner.models.megatron_layout import megatron_layout, padded_vocab_size, stage_layers
from aligner.models.spec import ModelSpec
from aligner.policy.attention import PackedAttention, PackedRotary, RMSNorm
from aligner.reshard.region import Piece
from aligner.reshard.storage import strided_view
from aligner.spmd.mesh import Mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model."""

    gpt: GPTModel
    config: TransformerConfig
    layout: list[Piece]
    """Which region of which checkpoint tensor each parameter holds."""

    def view(self, piece: Piece) -> Tensor:
        """The strided view of a parameter that holds `piece`; writable."""
        return strided_view(self.parameters[piece.storage].data, piece)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by their Megatron name."""
        return dict(self.gpt.named_parameters())


def keep_values(weight: Tensor) -> Tensor:
    """Initialisation that does nothing: weights come from a checkpoint. Skipping initialisation altogether
    (`perform_initialization=False`) would leave the tensor-parallel marks unset and the gradient norm wrong."""
    return weight


def transformer_config(
    spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, sequence_parallel: bool, recompute: str
) -> TransformerConfig:
    """Megatron's configuration of this checkpoint under this mesh."""
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        ffn_hidden_size=spec.ffn,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_eps,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
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
        sequence_parallel=sequence_parallel,
        # a row-wise mean over the global batch is in the loss's own weights: gradients are summed, never averaged
        calculate_per_token_loss=True,
        variable_seq_lengths=mesh.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, in dense models too
        batch_p2p_comm=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **settings[recompute],
    )


def build_model(
    spec: ModelSpec,
    mesh: Mesh,
    rank: int,
    groups: ProcessGroupCollection,
    device: torch.device,
    dtype: str,
    sequence_parallel: bool,
    recompute: str = "none",
) -> ShardedModel:
    """The part of the model that `rank` holds, with zeroed weights."""
    at = mesh.coordinates(rank)
    first, last = at["pipeline"] == 0, at["pipeline"] == mesh.last_stage
    layers = stage_layers(spec, at["pipeline"], mesh.pipeline, f"placement.{mesh.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_config(spec, mesh, DTYPES[dtype], sequence_parallel, recompute)
        model_parallel_cuda_manual_seed(1, tp_rank=at["tensor"], ep_rank=0, etp_rank=at["tensor"], force_reset_rng=True)
        gpt = GPTModel(
            config,
            _layer_specs(config, len(layers)),
            vocab_size=padded_vocab_size(spec, mesh.tensor),
            max_sequence_length=spec.max_positions,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=spec.tied,
            pg_collection=groups,
        )
    gpt.rotary_pos_emb = PackedRotary(spec, device)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()  # rows that pad the vocabulary stay zero
    gpt.to(device)
    layout = megatron_layout(
        spec,
        at["tensor"],
        mesh.tensor,
        layers.start,
        len(layers),
        first_stage=first,
        last_stage=last,
        dtype=dtype,
    )
    model = ShardedModel(gpt, config, layout)
    unfed = sorted(set(model.parameters) ^ {piece.storage for piece in layout})
    assert not unfed, f"{unfed[0]} is not both in the model and in its layout"
    return model


def _layer_specs(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm))
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
