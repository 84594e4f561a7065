"""Fields of config.json that nobody reads: those that compute nothing, and the refusal of all others (no torch).

A field that this version does not know may say how the model computes; to pass over it would train another model than
the one that transformers or the engine runs. So each field is implemented, or listed here, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aligner.models.config_json import ConfigJson

# how the file came about, and what it is called
_PROVENANCE = """_commit_hash _name_or_path name_or_path original_max_position_embeddings transformers_version
transformers.js_config unsloth_fixed unsloth_version"""
# read elsewhere, or by the tokenizer and generation alone
_TOKENS = """bos_token_id cls_token_id decoder_start_token_id eos_token_id mask_token_id pad_token_id prefix sep_token_id
tokenizer_class tokenizer_model_max_length unk_token_id"""
_GENERATION = """assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences
output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature
top_k top_p typical_p"""
# what is returned or kept beside the logits, how it is computed, and what a new model would start with
_RUNNING = """_attn_implementation_autoset _experts_implementation_autoset chunk_size_feed_forward gradient_checkpointing
initializer_range is_decoder is_llama_config output_attentions output_hidden_states pretraining_tp tie_last_hidden_states use_cache"""
_TASK = "finetuning_task id2label label2id num_labels problem_type task_specific_params"
# they say something only together with a field that is read: use_sliding_window, output_router_logits
_DEPENDENT = "max_window_layers router_aux_loss_coef"
INERT = frozenset(" ".join((_PROVENANCE, _TOKENS, _GENERATION, _RUNNING, _TASK, _DEPENDENT)).split())
"""Any value: the logits are the same."""

LENGTHS = (
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Beside max_position_embeddings, the engine's limits of a sequence, the least of which counts."""

_ONE = (1,)
_NULL = (None,)
_KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", None)
_EXPERT_KERNELS = ("grouped_mm", "eager", "batched_mm", None)
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "_attn_implementation": _KERNELS,
    "_experts_implementation": _EXPERT_KERNELS,
    "attn_implementation": _KERNELS,
    "experts_implementation": _EXPERT_KERNELS,
    "embedding_multiplier": _ONE,
    "decoder": _NULL,  # a configuration inside the configuration is used in its place, false too
    "dual_chunk_attention_config": _NULL,
    "generator": _NULL,
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "llm_config": _NULL,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "per_layer_config": _NULL,
    "pruned_heads": ({}, None),
    "quantization_config": _NULL,
    "residual_multiplier": _ONE,
    "return_dict": (True,),  # transformers' own models fail without
    "rswa_window": _NULL,
    "shared_expert_intermediate_size": (0,),
    "speculators_config": _NULL,
    "text_config": _NULL,
    "text_encoder": _NULL,
    "use_bidirectional_attention": (False, None),
    "vision_feature_select_strategy": _NULL,
}
"""Fields of other families, or of all, with the values under which they do nothing; the first is named."""

# another file in place of this one, or how it is read; and what the engine takes for other names of fields that it has: null too
_NEVER = frozenset(
    [
        "attribute_map",
        "configuration_files",
        "hidden_size_per_head",
        "moe_num_experts",
        "moe_top_k",
        "moe_topk",
        "multi_query_group_num",
        "n_head_kv",
        "n_routed_experts",
        "num_attention_groups",
        "num_experts_per_token",
        "num_kv_heads",
        "rotary_emb_base",
        "rotary_emb_fraction",
        "rotary_pct",
        "sub_configs",
        "top_k_experts",
    ]
)
_DROPOUT = re.compile(r"dropout|_pdrop$")


def check_unread(config: ConfigJson, inert: frozenset[str] = frozenset()) -> None:
    """ValueError for the first field that nobody asked for and that may say how the model computes.

    Args:
        inert: fields of the model's family alone that change nothing.
    """
    for key, value in config.unread().items():
        named = key in _NOTHING or key in _NEVER or key == "auto_map"
        if key in INERT or key in inert or (not named and (value is None or value is False)):
            continue
        if key in _NOTHING:
            config.only(key, _NOTHING[key])
        elif key == "auto_map":
            check_auto_map(config, value)
        elif _DROPOUT.search(key):
            config.only(key, (0.0,), ": training here, like the engine, drops nothing out")
        else:
            raise config.error(
                f"{key}={value!r} is not known, and may change what the model computes: transformers and the engine could "
                f"run another model than is trained. Remove {key} from config.json if the model is the same without it."
            )


def check_auto_map(config: ConfigJson, value: Any) -> None:
    """ValueError for code of the checkpoint's own where it may not be run: it could be what the weights were made for."""
    if value is None:
        raise config.error("auto_map=null cannot be read by transformers; remove auto_map from config.json.")
    if names_model_code(value):
        raise config.error(
            f"auto_map={value!r} names code of the checkpoint's own, which is run only with model.trust_remote_code=true "
            "(and engine=fsdp). Remove auto_map from config.json if the model is that of its architecture."
        )


def names_model_code(auto_map: Any) -> bool:
    """An auto_map names a configuration or a model, and not a tokenizer or processor alone."""
    if not isinstance(auto_map, dict):
        return auto_map is not None
    return any(not name.startswith(("AutoTokenizer", "AutoProcessor")) for name in auto_map)
