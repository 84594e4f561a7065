"""Every mistake ends in one clear error that names the setting or the line: on all ranks alike, without a hang.

Mistakes that are found before the world starts run in one program of 2 ranks, which calls `aligner.main.main` for each;
the others, and one of the former for its exit status, are torchrun jobs of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.e2e.bad_data import BAD_DATA, write_bad_data

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = not torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """One mistake. `{bad}` and `{task}` in its texts are folders of bad and of good files."""

    name: str
    settings: str
    """Overrides, separated by blanks, on top of a job that would run."""
    said: tuple[str, ...]
    """What the error must say: the setting or the line, and what would work."""
    env: dict[str, str] = field(default_factory=dict)


SFT = "algorithm=sft data=demonstrations data.eval_path=null ~algorithm.group_size"
DPO = "algorithm=dpo data=preferences data.eval_path=null ~algorithm.group_size data.path={task}/preferences.jsonl"
FOUR = {"WORLD_SIZE": "4"}

MODEL = [
    Case("missing", "model.path={bad}/nowhere", ("model.path={bad}/nowhere is not a folder", "Hugging Face")),
    Case("no_config", "model.path={bad}/no_config", ("model.path={bad}/no_config has no config.json",)),
    Case(
        "config_malformed",
        "model.path={bad}/config_malformed",
        ("{bad}/config_malformed/config.json is not valid JSON",),
    ),
    Case("config_no_object", "model.path={bad}/config_list", ("config.json must hold a JSON object, found list",)),
    Case(
        "architecture",
        "model.path={bad}/architecture",
        ("architecture GPT2LMHeadModel is not supported", "LlamaForCausalLM, MistralForCausalLM"),
    ),
    Case(
        "no_weights", "model.path={bad}/no_weights", ("model.path={bad}/no_weights has neither model.safetensors nor",)
    ),
    Case(
        "weights_truncated",
        "model.path={bad}/truncated",
        ("{bad}/truncated/model.safetensors cannot be read", "incomplete"),
    ),
    Case("tensor_missing", "model.path={bad}/lacking", ("has no tensor model.norm.weight", "config.json")),
    Case(
        "tensor_misshapen",
        "model.path={bad}/misshapen",
        ("model.norm.weight has shape (63,)", "config.json says (64,)"),
    ),
    Case(
        "no_tokenizer",
        "model.path={bad}/no_tokenizer",
        ("model.path={bad}/no_tokenizer has no tokenizer", "tokenizer.json"),
    ),
    Case(
        "tokenizer_damaged",
        "model.path={bad}/bad_tokenizer",
        ("model.path={bad}/bad_tokenizer: the tokenizer cannot be read",),
    ),
    Case(
        "no_pad_token",
        "model.path={bad}/no_pad",
        ("no pad token", '"pad_token"', "tokenizer_config.json", "'<eos>' will do"),
    ),
    Case("no_end_token", "model.path={bad}/no_eos", ("no end token", '"eos_token"', "tokenizer_config.json")),
    Case("model_never_ends", "model.path={bad}/endless", ("no eos_token_id", "sampling.stop_token_ids=[2]")),
    Case("tokenizer_too_large", "model.path={bad}/small_vocab", ("token ids up to 127", "vocab_size", "is 100")),
    Case(
        "no_table",
        "model.path={bad}/gpt2",
        ("policy.engine=megatron: architecture GPT2LMHeadModel", "use policy.engine=fsdp", "LlamaForCausalLM"),
    ),
    Case(
        "unknown_type",
        "model.path={bad}/unknown_type policy.engine=fsdp",
        ("{bad}/unknown_type/config.json: transformers cannot read it", "newmodel"),
    ),
    Case(
        "own_code",
        "model.path={bad}/own_code policy.engine=fsdp",
        ("auto_map=", "code of the checkpoint's own", "model.trust_remote_code=true"),
    ),
    Case(
        "not_packable",
        "model.path={bad}/linear policy.engine=fsdp",
        (
            "policy.engine=fsdp: ",
            "Qwen3NextForCausalLM has recurrent layers",
            "nor does policy.engine=megatron",
            "kind: engine",
        ),
    ),
    Case(
        "trained_by_none",
        "model.path={bad}/linear",
        (
            "policy.engine=fsdp: ",
            "Qwen3NextForCausalLM has recurrent layers",
            "nor does policy.engine=megatron",
            "kind: engine",
        ),
    ),
    Case(
        "index_names_no_file",
        "model.path={bad}/index_file",
        ("{bad}/index_file/model.safetensors.index.json names model-00002-of-00002.safetensors, which is not there",),
    ),
    Case(
        "index_names_no_tensor",
        "model.path={bad}/index_tensor",
        ("model-00002-of-00002.safetensors has no tensor model.norm.weight, which its index says it has",),
    ),
    Case("index_malformed", "model.path={bad}/index_list", ("model.safetensors.index.json is not a valid index",)),
    Case(
        "pickled_weights",
        "model.path={bad}/pickled",
        ("model.path={bad}/pickled has neither model.safetensors nor", "save_pretrained"),
    ),
    Case(
        "quantized_by_its_config",
        "model.path={bad}/quantized",
        ("{bad}/quantized/config.json: quantization_config=", "only quantization_config=null is"),
    ),
    Case("quantized_weights", "model.path={bad}/int8", ("model.norm.weight is I8; weights must be float32, bfloat16",)),
    Case("double_weights", "model.path={bad}/float64", ("model.norm.weight is F64; weights must be", "dtype=...")),
    Case("type_of_no_name", "model.path={bad}/type_list", ("model_type=['llama'] must be a name",)),
    Case(
        "field_of_wrong_type",
        "model.path={bad}/text_size",
        ("hidden_size must be a positive whole number, found '64'",),
    ),
    Case(
        "field_of_wrong_type_to_transformers",
        "model.path={bad}/granite_text policy.engine=fsdp rollout.engine=transformers",
        ("{bad}/granite_text/config.json: transformers cannot read it", "hidden_size"),
    ),
    Case(
        "field_that_makes_no_model",
        "model.path={bad}/granite_act policy.engine=fsdp rollout.engine=transformers",
        ("{bad}/granite_act/config.json: transformers cannot make a GraniteForCausalLM of hidden_act='relux'",),
    ),
    Case(
        "another_familys_weights",
        "model.path={bad}/granite policy.engine=fsdp rollout.engine=transformers",
        ("{bad}/granite has", "config.json"),
    ),
    Case("training_engine", "policy.engine=deepspeed", ("policy.engine=deepspeed is unknown", "use megatron, fsdp")),
    Case("no_path", "model.path=???", ("model.path has no value", "model.path=...")),
]
DATA = [
    Case("missing", "data.path={bad}/nowhere.jsonl", ("data.path={bad}/nowhere.jsonl does not exist",)),
    Case(
        "folder",
        "data.path={bad}/no_weights",
        ("data.path={bad}/no_weights is a folder without data files", "give a file"),
    ),
    Case("unreadable", "data.path=/proc/self/mem", ("data.path=/proc/self/mem cannot be read",)),
    Case("empty", "data.path={bad}/empty.jsonl", ("data.path={bad}/empty.jsonl has no rows",)),
    Case("malformed_line", "data.path={bad}/malformed.jsonl", ("{bad}/malformed.jsonl:3 is not valid JSON", "column")),
    Case("not_utf8", "data.path={bad}/latin.jsonl", ("{bad}/latin.jsonl:2 is not UTF-8",)),
    Case("no_object", "data.path={bad}/array.jsonl", ("{bad}/array.jsonl:2 is a JSON list, not an object",)),
    Case("no_prompt", "data.path={bad}/other.jsonl", ("{bad}/other.jsonl:2", "'prompt' or 'messages'", "['question']")),
    Case("empty_prompt", "data.path={bad}/blank.jsonl", ("{bad}/blank.jsonl:2: 'prompt' is empty",)),
    Case(
        "prompt_of_wrong_type",
        "data.path={bad}/number.jsonl",
        ("{bad}/number.jsonl:2: 'prompt' must be text, not int",),
    ),
    Case(
        "messages_of_wrong_form",
        "data.path={bad}/messages.jsonl",
        ("{bad}/messages.jsonl:2: messages[0]", "'role' and 'content'"),
    ),
    Case(
        "long_prompt",
        "data.path={bad}/long.jsonl",
        ("{bad}/long.jsonl:2: the prompt has 31 tokens, more than data.max_prompt_tokens=16", "raise it to 31"),
    ),
    Case(
        "longer_than_the_engine",
        "sampling.max_tokens=60",
        ("data.max_prompt_tokens=16 + sampling.max_tokens=60", "rollout.max_model_len=64", "raise it to 76"),
    ),
    Case(
        "beyond_positions",
        "rollout.max_model_len=1024",
        ("rollout.max_model_len=1024 is beyond the 512 positions", "use 512 or less"),
    ),
    Case(
        "few_prompts",
        "data.prompts_per_step=65",
        ("data.prompts_per_step=65", "64 rows of data.path=", "use 64 or less"),
    ),
    Case("no_path", "data.path=null", ("data.path is not set", "data=column_addition")),
    Case(
        "heldout_missing", "data.eval_path={bad}/nowhere.jsonl", ("data.eval_path={bad}/nowhere.jsonl does not exist",)
    ),
    Case("heldout_empty_prompt", "data.eval_path={bad}/blank.jsonl", ("{bad}/blank.jsonl:2: 'prompt' is empty",)),
    Case("kind", "data.kind=preferences", ("data.kind=preferences", "use data.kind=prompts")),
    Case("task", "data=column_addition data.task.digits=1", ("data.task cannot be built", "raise digits")),
    Case(
        "pairs_form", f"{DPO} data.path={{bad}}/number.jsonl", ("{bad}/number.jsonl:1: a row is one of", "'rejected'")
    ),
    Case(
        "pairs_alike",
        f"{DPO} data.path={{bad}}/alike.jsonl",
        ("{bad}/alike.jsonl:2: chosen and rejected are the same",),
    ),
    Case("pairs_empty", f"{DPO} data.path={{bad}}/unsaid.jsonl", ("{bad}/unsaid.jsonl:1: 'rejected' is empty",)),
    Case(
        "pairs_too_long",
        f"{DPO} data.max_tokens=12",
        ("preferences.jsonl:1: an answer with its prompt has", "data.max_tokens=12", "data.too_long=drop"),
    ),
    Case(
        "pairs_all_dropped",
        f"{DPO} data.max_tokens=2 data.too_long=drop",
        ("no pair is left (too long: ", "data.max_tokens=2"),
    ),
    Case(
        "scores_not_of_answers",
        f"{DPO} data.path={{bad}}/scores.jsonl",
        ("{bad}/scores.jsonl:1: 'response' and 'score' must be",),
    ),
    Case(
        "feedback_label",
        "algorithm=kto data=feedback ~algorithm.group_size data.path={bad}/label.jsonl",
        ("{bad}/label.jsonl:1: 'label' must be true or false, not 'good'",),
    ),
    Case(
        "dpo_of_prompts",
        f"{DPO} data=prompts",
        ("algorithms.dpo.dpo iterates over preferences", "use data.kind=preferences"),
    ),
    Case(
        "sft_form",
        f"{SFT} data.path={{bad}}/number.jsonl",
        ("{bad}/number.jsonl:1: a demonstration is one of", "'completion'"),
    ),
    Case(
        "sft_empty_completion",
        f"{SFT} data.path={{bad}}/silent.jsonl",
        ("{bad}/silent.jsonl:2: 'completion' is empty",),
    ),
    Case(
        "sft_too_long",
        f"{SFT} data.path={{task}}/demonstrations.jsonl data.max_tokens=20",
        ("demonstrations.jsonl:1: the demonstration has", "data.max_tokens=20", "data.too_long=drop"),
    ),
    Case(
        "sft_beyond_positions",
        f"{SFT} data.path={{bad}}/endless.jsonl",
        ("a demonstration has 610 tokens", "512 positions", "data.max_tokens=512"),
    ),
    Case(
        "sft_of_prompts",
        f"{SFT} data=prompts",
        ("algorithms.sft.sft iterates over demonstrations", "use data.kind=demonstrations"),
    ),
]
SETTINGS = [
    Case("stream_on_policy_loss", "algorithm=rloo stream.lag=1", ("stream.lag=1", "algorithm=grpo_decoupled")),
    Case("stream_samples_nothing", f"{SFT} stream.step_tokens=8", ("stream.step_tokens=8", "samples nothing")),
    Case("stream_in_flight", "stream.in_flight=true", ("stream.in_flight=true", "set stream.lag=1")),
    Case("unknown_key", "sede=1", ("sede=1: there is no setting sede", "did you mean seed")),
    Case("unknown_nested_key", "train.stps=3", ("there is no setting train.stps", "did you mean train.steps")),
    Case("unknown_deep_key", "policy.optimizer.learning_rate=1", ("no setting policy.optimizer.learning_rate",)),
    Case(
        "unknown_key_of_the_algorithm",
        "algorithm.grup_size=3",
        ("algorithm.grup_size", "did you mean algorithm.group_size"),
    ),
    Case("added_key", "+train.epochs=3", ("there is no setting train.epochs", "train has steps, eval_every")),
    Case(
        "key_that_the_loop_lacks",
        "+algorithm.clip=3",
        ("Key 'clip' not in 'GrpoConfig'", "settings of grpo: roles, group_size, advantages, whiten"),
    ),
    Case("key_that_the_loss_lacks", "+algorithm.loss.clip_lo=1", ("algorithm.loss.clip_lo", "clip_low, clip_high")),
    Case(
        "option",
        "algorithm=gppo",
        ("algorithm/gppo: no such configuration; available: dapo, dapo_paper, dpo, dr_grpo, grpo, grpo_decoupled",),
    ),
    Case(
        "option_of_no_name", "placement=2", ("placement=2: no such configuration; available: colocated, mixed, split",)
    ),
    Case("word_for_a_number", "train.steps=many", ("train.steps=many", "give a whole number")),
    Case("fraction_for_a_whole", "train.steps=1.5", ("train.steps=1.5", "give a whole number")),
    Case("word_for_a_fraction", "policy.optimizer.lr=fast", ("policy.optimizer.lr=fast", "give a number")),
    Case("word_for_a_switch", "train.save=maybe", ("train.save=maybe", "use true or false")),
    Case("null_for_a_number", "train.steps=null", ("train.steps=null", "give a value")),
    Case("number_for_a_group", "policy.optimizer=5", ("policy.optimizer=5 is not possible", "lr, min_lr_ratio")),
    Case("number_for_a_group_size", "algorithm.group_size=x", ("algorithm", "'x'", "Integer", "group_size")),
    Case("override_without_value", "train.steps", ("'train.steps' is not a setting; write KEY=VALUE",)),
    Case("override_without_key", "=5", ("'=5' is not a setting; write KEY=VALUE",)),
    Case(
        "override_with_an_open_bracket",
        "placement.policy.ranks=[0",
        ("'placement.policy.ranks=[0' is not", "KEY=VALUE"),
    ),
    Case("flag", "--steps", ("--steps is not a flag", "KEY=VALUE")),
    Case("short_flag", "-n", ("-n is not a flag", "KEY=VALUE")),
    Case("flag_value", "--cfg=all", ("--cfg", "'all'", "'job'")),
    Case("config_name", "--config-name=nope", ("--config-name=nope", "available: calculator, calculator_sft, ")),
    Case("config_dir", "--config-dir={bad}/nowhere", ("--config-dir={bad}/nowhere is not a folder",)),
    Case("dtype", "policy.dtype=float8", ("policy.dtype=float8 is unknown", "use float32, bfloat16")),
    Case("negative_lr", "policy.optimizer.lr=-1e-3", ("policy.optimizer.lr=-0.001 must be at least 0",)),
    Case(
        "schedule",
        "policy.optimizer.schedule=step",
        ("policy.optimizer.schedule=step is unknown", "constant, linear, cosine"),
    ),
    Case("wandb", "logging.wandb=yes", ("logging.wandb=", "off, offline, online")),
    Case("temperature_0", "sampling.temperature=0", ("sampling.temperature=0", "1.0 is usual")),
    Case("temperature_negative", "sampling.temperature=-1", ("sampling.temperature=-1", "must be between 0 and 2")),
    Case("top_p", "sampling.top_p=0.9", ("sampling.top_p=0.9", "use top_p=1")),
    Case("group_of_0", "algorithm.group_size=0", ("algorithm.group_size=0", "must be at least 2")),
    Case("group_of_1", "algorithm.group_size=1", ("algorithm.group_size=1", "must be at least 2")),
    Case(
        "normalize",
        "algorithm.advantages.normalize=mean",
        ("algorithm.advantages: normalize='mean' is unknown", "use one of std, none"),
    ),
    Case(
        "loop_not_importable", "algorithm._target_=nowhere.loop", ("algorithm._target_=nowhere.loop", "module.function")
    ),
    Case(
        "loop_of_one_argument",
        "algorithm._target_=json.dumps",
        ("json.dumps must be a function of (roles, batches, cfg)",),
    ),
    Case(
        "loss_not_importable",
        "algorithm.loss._target_=nowhere.loss",
        ("algorithm.loss._target_=nowhere.loss", "nowhere"),
    ),
    Case(
        "roles_unknown",
        "algorithm.roles=[policy,judge]",
        ("algorithm.roles=['policy', 'judge']", "rollout, reference, reward, critic, reward_model"),
    ),
    Case(
        "evaluation_without_rollout",
        "algorithm.roles=[policy] train.eval_every=1",
        ("train.eval_every=1", "train.eval_every=0"),
    ),
    Case("best_never_evaluated", "train.keep_best=true", ("train.keep_best=true", "set train.eval_every=10")),
    Case(
        "best_of_nothing",
        "train.keep_best=true train.eval_every=1 data.eval_path=null",
        ("train.keep_best=true", "give data.eval_path"),
    ),
    Case(
        "best_metric",
        "train.keep_best=true train.eval_every=1 train.best_metric=reward",
        ("train.best_metric=reward", "use accuracy"),
    ),
    Case("seed_of_65_bits", f"seed={2**64}", (f"seed={2**64} must be between 0 and {2**63 - 1}",)),
    Case(
        "minibatches",
        "policy.minibatches=5 data.prompts_per_step=4",
        ("policy.minibatches=5 is more than the 4 of data.prompts_per_step=4", "use 1 to 4"),
    ),
    Case("export_keep", "train.export_keep=-1", ("train.export_keep=-1 must be at least 0",)),
    Case(
        "starts_from_its_own_export",
        "run_dir={bad}/again overwrite=true model.path={bad}/again/best",
        ("model.path={bad}/again/best is an export of the run in run_dir={bad}/again", "another run_dir"),
    ),
    Case("run_dir_used", "run_dir={bad}/used", ("run_dir={bad}/used already holds a run", "overwrite=true")),
    Case(
        "run_dir_is_a_file",
        "run_dir={bad}/empty.jsonl",
        ("run_dir={bad}/empty.jsonl cannot be written", "another folder"),
    ),
    Case(
        "run_dir_below_a_file",
        "run_dir={bad}/empty.jsonl/run",
        ("/empty.jsonl/run cannot be written", "another folder"),
    ),
    Case("run_dir_not_writable", "run_dir=/proc/run", ("run_dir=/proc/run cannot be written", "another folder")),
]
SHARED = "rollout.engine=transformers rollout.share_policy_weights=true"
PLACEMENT = [
    Case("fsdp_tensor", "policy.engine=fsdp placement.policy.tensor=2", ("placement.policy.tensor=2", "engine=fsdp", "use 1, or engine=megatron")),
    Case("fsdp_replicas", "policy.engine=fsdp placement.policy.replicas=3", ("placement.policy.replicas=3 does not divide its 2", "use 1 or 2")),
    Case("megatron_replicas", "placement.policy.replicas=2", ("placement.policy.replicas=2", "engine=megatron does not have", "use 1")),
    Case("heads", "placement.policy.tensor=3", ("placement.policy.tensor=3 does not divide the 4 heads", "use 1, 2 or 4"), {"WORLD_SIZE": "3"}),
    Case("rollout_heads", "placement.rollout.tensor=3", ("placement.rollout.tensor=3", "use 1, 2, 4"), {"WORLD_SIZE": "3"}),
    Case("ranks_undivided", "placement.policy.tensor=3", ("placement.policy.tensor=3 does not divide its 2 rank(s)", "use 1 or 2")),
    Case("size_of_0", "placement.rollout.tensor=0", ("placement.rollout.tensor=0 must be at least 1",)),
    Case("layers", "placement.policy.pipeline=4", ("placement.policy.pipeline=4 does not divide the 2 layers", "use 1 or 2"), FOUR),
    Case("rollout_engine", "rollout.engine=sglang", ("rollout.engine=sglang is unknown; use vllm, transformers",)),
    Case("transformers_tensor", "rollout.engine=transformers placement.rollout.tensor=2", ("placement.rollout.tensor=2", "holds the whole model", "use 1, or engine=vllm"), {"WORLD_SIZE": "2"}),
    Case("fp8_on_a_cpu", "rollout.quantization=fp8", ("rollout.quantization=fp8 is for GPUs", "use rollout.quantization=none")),
    Case("fp8_transformers", "rollout.quantization=fp8 rollout.engine=transformers", ("rollout.quantization=fp8: engine=transformers", "use rollout.engine=vllm")),
    Case("share_vllm", "rollout.share_policy_weights=true", ("rollout.share_policy_weights=true: engine=vllm", "use rollout.engine=transformers")),
    Case("share_megatron", f"{SHARED}", ("rollout.share_policy_weights=true: policy.engine=megatron", "use policy.engine=fsdp")),
    Case("share_parts", f"{SHARED} policy.engine=fsdp", ("each rank holds one of 2 parts of the policy", "placement.policy.replicas=2")),
    Case("share_elsewhere", f"{SHARED} policy.engine=fsdp placement=split", ("rank 1 of the rollout is none of the policy's", "placement.rollout.ranks=policy")),
    Case("share_half", f"{SHARED} policy.engine=fsdp placement.policy.replicas=2 rollout.dtype=bfloat16", ("they are float32, and rollout.dtype=bfloat16", "use rollout.dtype=float32")),
    Case("share_ahead", f"{SHARED} policy.engine=fsdp placement.policy.replicas=2 algorithm=grpo_decoupled stream.lag=1", ("stream.lag=1 generates with weights from before an update", "use stream.lag=0")),
    Case("rollout_pipeline", "placement.rollout.pipeline=3", ("placement.rollout.pipeline=3", "2 layers"), {"WORLD_SIZE": "3"}),
    Case("reward_pipeline", "placement.reward.pipeline=2", ("placement.reward.pipeline=2", "use 1")),
    Case("outside", "placement.rollout.ranks=[1,2]", ("placement.rollout.ranks=[1, 2]", "rank(s) [2]", "use 0 to 1", "--nproc-per-node 3")),
    Case("negative", "placement.policy.ranks=[-1]", ("placement.policy.ranks=[-1]: ranks count from 0", "use 0 to 1")),
    Case("repeated", "placement.policy.ranks=[0,0]", ("placement.policy.ranks=[0, 0]", "none twice")),
    Case("words", "placement.policy.ranks=first", ("placement.policy.ranks='first' is not understood", "use all")),
    Case("words_in_a_list", "placement.policy.ranks=[a,b]", ("placement.policy.ranks=['a', 'b'] is not understood", "use all")),
    Case("no_ranks", "placement.reward.ranks=null", ("placement.reward.ranks=None is not understood", "use all")),
    Case("context", "placement.policy.context=3", ("placement.policy.context=3 does not divide its 2 rank(s)", "use 1 or 2")),
    Case("rollout_context", "placement.rollout.context=2", ("placement.rollout.context=2 is not supported for rollout; use 1",)),
    Case("expert", "placement.policy.expert=2", ("placement.policy.expert=2", "has no experts")),
    Case("rollout_expert", "placement.rollout.expert=2", ("placement.rollout.expert=2", "use 1")),
    Case("stage_layers", "placement.policy.pipeline=2 placement.policy.stage_layers=[1,2]", ("placement.policy.stage_layers=[1, 2]", "2 layers")),
    Case("virtual_pipeline", "placement.policy.pipeline=2 placement.policy.virtual_pipeline=2", ("placement.policy.pipeline=2", "virtual_pipeline=2 makes more chunks")),
    Case("bucket", "reshard.bucket_mib=0", ("reshard.bucket_mib=0.0 must be more than 0",)),
    Case("sequence_parallel", "placement.policy.sequence_parallel=true", ("placement.policy.sequence_parallel=true", "tensor > 1")),
    Case("reference_sizes", "placement.reference.tensor=2", ("placement.reference.ranks=policy", "placement.reference.ranks=all")),
    Case("world_size", "placement=split", ("placement.policy.ranks=0%-50%", "job of 1", "--nproc-per-node 2"), {"WORLD_SIZE": "1"}),
    *([Case("memory", "model.path={bad}/huge", ("GiB, and it has", "placement.policy.tensor"))] if ON_CPU else []),
]  # fmt: skip
REWARD = [
    Case(
        "not_importable",
        "reward.rule=nowhere.rule",
        ("reward.rule='nowhere.rule'", "cannot be imported", "No module named"),
    ),
    Case("neither_module_nor_file", "reward.rule=rule", ("reward.rule='rule'", "path/to/file.py:function")),
    Case("file_missing", "reward.rule='{bad}/nowhere.py:rule'", ("reward.rule=", "no such file", "{bad}/nowhere.py")),
    Case("function_missing", "reward.rule='{bad}/rules.py:absent'", ("reward.rule=", "has no 'absent'")),
    Case(
        "signature", "reward.rule='{bad}/rules.py:of_one'", ("reward.rule=", "must take (prompt, response, **fields)")
    ),
    Case(
        "kwargs",
        "reward.rule=aligner.reward.rules.exact_match +reward.kwargs.colour=red",
        ("reward.kwargs.colour: reward.rule='aligner.reward.rules.exact_match' has no", "it has answer, ignore_case"),
    ),
    Case("async", "reward.rule='{bad}/rules.py:later'", ("rules.py:later' is async", "fn(prompt, response, **fields)")),
    Case("generator", "reward.rule='{bad}/rules.py:each'", ("rules.py:each' yields", "fn(prompt, response, **fields)")),
    Case("class", "reward.rule='{bad}/rules.py:Kind'", ("rules.py:Kind' is a class", "fn(prompt, response, **fields)")),
    Case(
        "field_that_rows_lack",
        "reward.rule='{bad}/rules.py:of_level'",
        (
            "rules.py:of_level needs the field 'level' of each row",
            "rows of data.path=",
            "the first: row 1",
            "reward.kwargs.level",
        ),
    ),
    Case(
        "field_that_a_row_lacks",
        "data.path={bad}/lacks_answer.jsonl data.prompts_per_step=2 reward.rule=aligner.reward.rules.exact_match",
        ("needs the field 'answer'", "1 of the 2 rows of data.path={bad}/lacks_answer.jsonl", "the first: row 2"),
    ),
    Case("timeout", "reward.timeout_s=0", ("reward.timeout_s=0.0 must be finite and more than 0",)),
    Case(
        "no_reward_model",
        "reward=model reward.rule=''",
        ("reward.components.model.model=true needs the role reward_model; add it to algorithm.roles=",),
    ),
    Case(
        "eval_reward", "train.eval_reward=judge", ("train.eval_reward=judge is no component of the reward", "or null")
    ),
    Case(
        "eval_reward_of_none",
        "reward=model_and_verifier reward.rule='' +reward.components.model.normalize=batch train.eval_every=1 algorithm.roles=[policy,rollout,reward,reward_model] "
        "reward_model.path={task}/model",
        ("train.eval_reward=null", "normalised over each batch", "name one of its components: model, verifier"),
    ),
    Case("workers", "reward.workers=0", ("reward.workers=0 must be at least 1",)),
]
FORMATS = [Case(name, settings, said) for name, (settings, said) in BAD_DATA.items()]
GROUPS = {
    "model": MODEL,
    "data": DATA,
    "formats": FORMATS,
    "settings": SETTINGS,
    "placement": PLACEMENT,
    "reward": REWARD,
}
EARLY = {f"{group}-{case.name}": case for group, cases in GROUPS.items() for case in cases}

INDEX = "model.safetensors.index.json"
PROGRAM = """
import contextlib, io, json, os, sys, types
from pathlib import Path

import aligner.algorithms.grpo, aligner.algorithms.sft  # whose imports warn
import aligner.main as program
import aligner.run.loop

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
ended = types.SimpleNamespace(sleep=lambda seconds: sys.exit(2))  # the launcher ends the ranks that wait
alone = types.SimpleNamespace(sleep=lambda seconds: None)  # rank 0 has started the job
aligner.run.loop.run_job = lambda job: print("the job started", file=sys.stderr)
found = {}
for name, (arguments, env) in json.loads((folder / "cases.json").read_text()).items():
    program.time = alone if name == "alone" else ended
    before, said, code = dict(os.environ), io.StringIO(), None
    os.environ.update(env)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            program.main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
    os.environ.update(before)
    found[name] = (code, said.getvalue())
(folder / f"found.{rank}.json").write_text(json.dumps(found))
"""

FILES = {
    "empty.jsonl": b"\n",
    "malformed.jsonl": b'{"prompt": "<bos>1"}\n\n{"prompt": "<bos>2"\n',
    "latin.jsonl": b'{"prompt": "1"}\n{"prompt": "\xe9"}\n',
    "array.jsonl": b'{"prompt": "1"}\n["1"]\n',
    "other.jsonl": b'{"prompt": "1"}\n{"question": "1"}\n',
    "blank.jsonl": b'{"prompt": "1"}\n{"prompt": " "}\n',
    "number.jsonl": b'{"prompt": "1"}\n{"prompt": 1}\n',
    "messages.jsonl": b'{"prompt": "1"}\n{"messages": [{"role": "user"}]}\n',
    "long.jsonl": b'{"prompt": "1"}\n{"prompt": "<bos>' + b"1" * 30 + b'"}\n',
    "silent.jsonl": b'{"prompt": "1", "completion": "1"}\n{"prompt": "1", "completion": ""}\n',
    "endless.jsonl": (b'{"prompt": "' + b"1" * 9 + b'", "completion": "' + b"1" * 600 + b'"}\n') * 4,
    "alike.jsonl": b'{"prompt": "1", "chosen": "2", "rejected": "3"}\n{"prompt": "1", "chosen": "2", "rejected": "2"}\n',
    "unsaid.jsonl": b'{"prompt": "1", "chosen": "2", "rejected": ""}\n',
    "scores.jsonl": b'{"query": "1", "response": ["2", "3"], "score": [1]}\n',
    "label.jsonl": b'{"prompt": "1", "completion": "2", "label": "good"}\n',
    "used/metrics.jsonl": b"{}\n",
    "lacks_answer.jsonl": b'{"prompt": "<bos>1", "answer": "1"}\n{"prompt": "<bos>2", "solution": "2"}\n',
    "rules.py": b"def of_one(text):\n    return 1.0\n"
    b"def of_level(prompt, response, *, level):\n    return 1.0\n"
    b"async def later(prompt, response):\n    return 1.0\n"
    b"def each(prompt, response):\n    yield 1.0\n"
    b"class Kind:\n    def __init__(self, prompt, response):\n        pass\n",
}


def _write_bad(bad: Path, good: Path) -> None:
    """Files and model folders, each of them good but for one thing."""
    write_bad_data(bad / "data")
    for name, content in FILES.items():
        (bad / name).parent.mkdir(exist_ok=True)
        (bad / name).write_bytes(content)

    def model(name: str) -> Path:
        return Path(shutil.copytree(good, bad / name))

    def edit(file: Path, **changes: Any) -> None:
        """Change keys of a JSON file; None removes one."""
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    for name, lacks in [
        ("no_config", "config.json"),
        ("no_weights", "model.safetensors"),
        ("no_tokenizer", "tokenizer.json"),
    ]:
        (model(name) / lacks).unlink()
    (model("config_malformed") / "config.json").write_text('{"hidden_size": 64,')
    (model("config_list") / "config.json").write_text("[]")
    edit(model("architecture") / "config.json", architectures=["GPT2LMHeadModel"])
    for name, kind, architecture in [
        ("gpt2", "gpt2", "GPT2LMHeadModel"), ("unknown_type", "newmodel", "NewForCausalLM"),
        ("own_code", "newmodel", "NewForCausalLM"), ("linear", "qwen3_next", "Qwen3NextForCausalLM"),
    ]:  # fmt: skip
        edit(model(name) / "config.json", architectures=[architecture], model_type=kind)
    edit(bad / "own_code/config.json", auto_map={"AutoModelForCausalLM": "modeling.NewForCausalLM"})
    edit(model("small_vocab") / "config.json", vocab_size=100)
    edit(model("huge") / "config.json", hidden_size=1 << 20, intermediate_size=1 << 20)
    edit(model("no_pad") / "tokenizer_config.json", pad_token=None)
    edit(model("no_eos") / "tokenizer_config.json", eos_token=None)
    (model("bad_tokenizer") / "tokenizer.json").write_text("{}")
    edit(model("endless") / "config.json", eos_token_id=None)
    edit(bad / "endless/generation_config.json", eos_token_id=None)
    model("again/exports/step_4")
    (bad / "again" / "best").symlink_to("exports/step_4")
    weights = model("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, size in [("lacking", None), ("misshapen", 63)]:
        _replace_norm(model(name) / "model.safetensors", size)
    for name, dtype in [("int8", torch.int8), ("float64", torch.float64)]:
        _replace_norm(model(name) / "model.safetensors", 64, dtype)
    weights = model("pickled") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (_sharded(model("index_file")) / "model-00002-of-00002.safetensors").unlink()
    _replace_norm(_sharded(model("index_tensor")) / "model-00002-of-00002.safetensors", None)
    (_sharded(model("index_list")) / INDEX).write_text("[]")
    edit(model("quantized") / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    edit(model("type_list") / "config.json", architectures=None, model_type=["llama"])
    edit(model("text_size") / "config.json", hidden_size="64")
    for name, changes in [
        ("granite", {}),
        ("granite_text", {"hidden_size": "64"}),
        ("granite_act", {"hidden_act": "relux"}),
    ]:
        made: dict[str, Any] = {"architectures": ["GraniteForCausalLM"], "model_type": "granite", **changes}
        edit(model(name) / "config.json", **made)


def _replace_norm(weights: Path, size: int | None, dtype: torch.dtype = torch.float32) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    if size is not None:
        tensors["model.norm.weight"] = norm[:size].to(dtype)
    save_file(tensors, weights)


def _sharded(folder: Path) -> Path:
    """Its weights in two files: the last one's are those of the final norm and the output layer."""
    from safetensors.torch import load_file, save_file

    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number, last in ((1, False), (2, True)):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {
            name: value for name, value in tensors.items() if (name in ("model.norm.weight", "lm_head.weight")) == last
        }
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def bad(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    _write_bad(folder, task.folder / "model")
    return folder


def _arguments(case: Case, task: Any, bad: Path, run_dir: Path) -> list[str]:
    given = case.settings.format(bad=bad, task=task.folder).split()
    base = task.overrides(run_dir)
    if "~algorithm.group_size" in given:  # another loop than the base's: its settings go
        given.remove("~algorithm.group_size")
        base.remove("algorithm.group_size=4")
    return base + given


@pytest.fixture(scope="module")
def early(task: Any, bad: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[int | None, str]]]:
    """For each of 2 ranks: case -> (exit status, what was printed). One torchrun program for all of them."""
    folder = tmp_path_factory.mktemp("early")
    cases = {name: (_arguments(case, task, bad, folder / "run"), case.env) for name, case in EARLY.items()}
    (folder / "cases.json").write_text(json.dumps({**cases, "alone": cases["data-missing"]}))
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = fork_server.Popen(
        [*command, str(folder / "program.py"), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end within 240 s\n{process.communicate()[0][-5000:]}")
    assert process.returncode == 0, output[-5000:]
    assert not (folder / "run").exists(), "a refused job must leave nothing behind"
    return [json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(2)]


def _check_said(text: str, case: Case, task: Any, bad: Path, start: str) -> None:
    """One line of error, and all that the case wants in it."""
    lines = [line for line in text.splitlines() if "aligner: error" in line]
    assert len(lines) == 1, text[-5000:]
    assert lines[0].startswith(start), lines[0]
    for words in case.said:
        assert words.format(bad=bad, task=task.folder) in lines[0], lines[0]


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_the_world_starts(name: str, early: list[dict[str, Any]], task: Any, bad: Path) -> None:
    (code, said), (other_code, other_said) = early[0][name], early[1][name]
    assert code == 2, said
    _check_said(said, EARLY[name], task, bad, "aligner: error: ")
    assert "Traceback" not in said
    assert (other_code, other_said) == (2, ""), "other ranks find the same and are silent"


def test_there_are_enough_mistakes() -> None:
    assert len(EARLY) >= 40


def test_a_refused_job_is_over_at_once(torchrun: Callable[..., Any], task: Any, bad: Path, tmp_path: Path) -> None:
    """Both ranks end by the launcher's hand, one line is said, the status is not zero; no rank waits out its patience."""
    case = EARLY["data-malformed_line"]
    done = torchrun(2, ["-m", "aligner.main", *_arguments(case, task, bad, tmp_path / "run")], seconds=100)
    assert done.returncode != 0
    _check_said(done.stderr, case, task, bad, "aligner: error: ")
    assert done.stderr.count("Traceback") == 1, "the launcher's own"


def test_a_rank_that_is_alone_with_its_mistake_says_it(early: list[dict[str, Any]], task: Any, bad: Path) -> None:
    """A file that only one host lacks: rank 0 starts the job and says nothing, so the other rank speaks."""
    code, said = early[1]["alone"]
    assert code == 2
    _check_said(said, EARLY["data-missing"], task, bad, "aligner: error on rank 1: ")


OWN = '''
import time

import torch

from aligner.algorithms import Step


def nothing(roles, batches, cfg):
    """Yields nothing."""
    return
    yield


def raising(roles, batches, cfg):
    """Raises on one rank only, while the other waits for it."""
    for batch in batches:
        if roles.policy.world.rank == 1:
            raise RuntimeError("the disk of rank 1 is gone")
        yield Step(roles.policy.update(cfg.loss, roles.policy.scatter(batch)))


def scoring(roles, batches, cfg):
    """Scores demonstrations: rewards without an engine."""
    for batch in batches:
        roles.reward.score(roles.policy.scatter(batch))
        yield None


def yielding_numbers(roles, batches, cfg):
    """Yields what no driver can log."""
    for batch in batches:
        yield {"loss": 1.0}


def returning(roles, batches, cfg):
    """Is no generator."""
    return None


def nan(policy_logp_BT, *, mask_BT):
    return policy_logp_BT * float("nan"), {}


def failing(prompt, response, **fields):
    raise KeyError("no such answer")


def hanging(prompt, response, **fields):
    time.sleep(60)
'''
OWN_LOOP = f"{SFT} data.path={{task}}/demonstrations.jsonl algorithm.roles=[policy]"
LATE = {
    "loop_of_no_steps": Case("", f"{OWN_LOOP} algorithm._target_=own.nothing", ("yielded 0 steps of train.steps=5", "one per batch")),
    "loop_raises_on_one_rank": Case("", f"{OWN_LOOP} algorithm._target_=own.raising", ("RuntimeError: the disk of rank 1 is gone",)),
    "loop_yields_a_dict": Case("", f"{OWN_LOOP} algorithm._target_=own.yielding_numbers", ("algorithm._target_=own.yielding_numbers yielded a dict", "Step(metrics, samples, scores)")),
    "loop_is_no_generator": Case("", f"{OWN_LOOP} algorithm._target_=own.returning", ("own.returning returned None", "yields a Step for each batch")),
    "loss_of_nan": Case("", f"{OWN_LOOP} algorithm.loss._target_=own.nan", ("the loss is nan at optimizer step 0", "guards.not_finite.max_in_row=3", "policy.optimizer.lr")),
    "rule_hangs": Case(
        "",
        f"{OWN_LOOP} algorithm._target_=own.scoring algorithm.roles=[policy,reward] reward.rule=own.hanging reward.timeout_s=0.2",
        ("4 of 4 rows have no reward (4 timeout)", "reward.max_missing=0.5", "reward.timeout_s=0.2"),
    ),
    "rule_raises": Case(
        "",
        "reward.rule=own.failing train.eval_every=0",
        ("16 of 16 rows have no reward (16 failed)", "reward.max_missing=0.5", "reward.rule=own.failing", "no such answer"),
    ),
}  # fmt: skip
USERS = ("loop_of_no_steps", "loop_yields_a_dict", "loop_is_no_generator", "loss_of_nan", "rule_hangs", "rule_raises")
"""Mistakes that need no traceback; where own code raised, one shows the place."""


@pytest.mark.parametrize("name", LATE)
def test_stopped_on_every_rank(name: str, torchrun: Callable[..., Any], task: Any, bad: Path, tmp_path: Path) -> None:
    case = LATE[name]
    (tmp_path / "own.py").write_text(OWN)
    done = torchrun(2, ["-m", "aligner.main", *_arguments(case, task, bad, tmp_path / "run")], seconds=100)
    assert done.returncode != 0
    _check_said(done.stderr, case, task, bad, "aligner: error on rank ")
    assert done.stderr.count("Traceback") == 1 + (name not in USERS), "the launcher's own, and that of own code"
    if name == "loop_raises_on_one_rank":
        assert "aligner: error on rank 1: " in done.stderr
        assert "aligner: rank 0 exits because rank 1 failed." in done.stderr
