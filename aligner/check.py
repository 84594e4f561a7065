"""Everything that can be known wrong before a model is built or a process group made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aligner.config import Config
from aligner.data.demonstrations import Demonstration, tokenize_demonstrations
from aligner.data.jsonl import rows
from aligner.data.prompts import Prompt, tokenize_prompts
from aligner.data.tokenizer import load_tokenizer
from aligner.models.sizes import check_runs
from aligner.models.spec import ModelSpec, read_spec
from aligner.models.whole import check_weights
from aligner.reward.config import RewardConfig
from aligner.reward.pool import RulePool
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import Placement, make_meshes, reference_layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("policy", "rollout", "reference", "reward")
CHOICES = {
    "policy.dtype": ("float32", "bfloat16"),
    "rollout.dtype": ("float32", "bfloat16"),
    "policy.recompute": ("none", "selective", "full"),
    "policy.reduction": ("token_mean", "sequence_mean", "fixed"),
    "policy.optimizer.schedule": ("constant", "linear", "cosine"),
    "data.kind": ("prompts", "demonstrations"),
    "data.too_long": ("error", "drop"),
}
AT_LEAST = {
    "train.steps": 1,
    "train.eval_every": 0,
    "train.eval_temperature": 0,
    "data.prompts_per_step": 1,
    "data.max_prompt_tokens": 1,
    "data.max_tokens": 2,
    "data.eval_prompts": 1,
    "policy.micro_tokens": 1,
    "policy.minibatches": 1,
    "policy.epochs": 1,
    "policy.fixed_length": 0,
    "policy.optimizer.lr": 0,
    "policy.optimizer.warmup_steps": 0,
    "policy.optimizer.decay_steps": 0,
    "policy.optimizer.weight_decay": 0,
    "policy.optimizer.clip_grad": 0,
    "sampling.max_tokens": 1,
    "reward.workers": 1,
    "seed": 0,
    "timeout_seconds": 1,
}


@dataclass(frozen=True)
class Checked:
    """What the checks have read, ready for the roles."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    meshes: Mapping[str, Mesh]
    prompts: list[Prompt]
    demonstrations: list[Demonstration]
    heldout: list[Prompt]


def check(config: Config, roles: list[str], world_size: int) -> Checked:
    """Check the whole configuration against the model, the data and the number of ranks.

    Args:
        roles: the roles that the loop wants.

    Raises:
        ValueError: the first thing found wrong, with the setting and the values that would work.
    """
    _check_values(config)
    unknown = [role for role in roles if role not in ROLES]
    if unknown or "policy" not in roles:
        raise ValueError(f"algorithm.roles={roles} must hold policy and otherwise only {', '.join(ROLES[1:])}.")
    _check_ranks(config.placement)
    meshes = make_meshes(config.placement, world_size)
    spec = read_spec(config.model.path)
    for role in ("policy", "reference"):
        if role in roles:
            layout = reference_layout(config.placement) if role == "reference" else config.placement.policy
            check_runs(spec, meshes[role], layout.sequence_parallel, cpu=not torch.cuda.is_available())
    tokenizer = load_tokenizer(config.model.path)
    prompts, demonstrations, heldout = _read_data(config, tokenizer)
    _check_positions(demonstrations, spec)
    _check_evaluation(config, roles, heldout)
    if "rollout" in roles:
        rollout = meshes["rollout"]
        cpu = not torch.cuda.is_available()
        config.rollout.check_model(spec, rollout.tensor, cpu, rollout.expert > 1, rollout.pipeline)
        _check_lengths(config)
        _check_end(config, spec, tokenizer)
    _check_memory(config, spec, meshes, roles)
    check_weights(spec)
    _check_run_dir(config)
    if "reward" in roles:
        _check_rule(config.reward)
    return Checked(spec, tokenizer, meshes, prompts, demonstrations, heldout)


def _check_values(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = _get(config, key)
        if value not in allowed:
            raise ValueError(f"{key}={value} is unknown; use {', '.join(allowed)}.")
    for key, least in AT_LEAST.items():
        value = _get(config, key)
        if not value >= least:
            raise ValueError(f"{key}={value} must be at least {least}.")
    for key in ("policy.optimizer.beta1", "policy.optimizer.beta2"):
        if not 0 <= _get(config, key) < 1:
            raise ValueError(f"{key}={_get(config, key)} must be in [0, 1).")
    for key in ("reward.max_missing", "policy.optimizer.min_lr_ratio"):
        if not 0 <= _get(config, key) <= 1:
            raise ValueError(f"{key}={_get(config, key)} must be between 0 and 1.")
    config.logging.check()
    config.reshard.check()
    if (Path(config.run_dir) / "metrics.jsonl").exists() and not config.overwrite:
        raise ValueError(f"run_dir={config.run_dir} already holds a run; choose another folder or set overwrite=true.")
    sampling = config.sampling
    sampling.check("sampling")
    if sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 leaves nothing to compare in a group; use a positive one (1.0 is usual)."
        )
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        raise ValueError(
            f"sampling.top_p={sampling.top_p}, sampling.top_k={sampling.top_k}: the policy's log-probabilities are over "
            "the whole vocabulary, so training samples must be drawn from it too; use top_p=1 and top_k=0."
        )


def _check_ranks(placement: Placement) -> None:
    """The form of every `ranks`; what they name is checked where they become meshes."""
    for role in ROLES:
        ranks = getattr(placement, role).ranks
        if isinstance(ranks, tuple) and all(type(rank) is int for rank in ranks):
            continue
        if type(ranks) not in (str, int):
            raise ValueError(
                f"placement.{role}.ranks={list(ranks) if isinstance(ranks, tuple) else ranks} is not understood; use all, "
                'a list such as [0,1], or ranges like "0-3,6".'
            )


def _read_data(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Demonstration], list[Prompt]]:
    data = config.data
    if data.task is None and data.path is None:
        raise ValueError("data.path has no value; give a JSONL file, or choose a generated task: data=column_addition.")
    task = data.task
    prompts: list[Prompt] = []
    demonstrations: list[Demonstration] = []
    if data.kind == "prompts":
        source = task.prompt_rows() if task else rows(data.path or "")
        prompts = tokenize_prompts(source, tokenizer, data.max_prompt_tokens)
    else:
        source = task.demonstration_rows() if task else rows(data.path or "")
        too_long: Any = data.too_long
        demonstrations, _ = tokenize_demonstrations(source, tokenizer, data.max_tokens, too_long)
    count = len(prompts or demonstrations)
    if data.prompts_per_step > count:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} is more than the {count} rows of "
            f"{'data.task' if task else f'data.path={data.path}'}; use {count} or less, or give more rows."
        )
    heldout: list[Prompt] = []
    if data.kind == "prompts" and (task or data.eval_path):
        held_rows = task.heldout_rows() if task else rows(data.eval_path or "", "data.eval_path")
        heldout = tokenize_prompts(held_rows, tokenizer, data.max_prompt_tokens)[: data.eval_prompts]
    return prompts, demonstrations, heldout


def _check_lengths(config: Config) -> None:
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    if longest > config.rollout.max_model_len:
        raise ValueError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + sampling.max_tokens={config.sampling.max_tokens} is "
            f"more than rollout.max_model_len={config.rollout.max_model_len}; raise it to {longest}, or lower one of them."
        )


def _check_positions(demonstrations: list[Demonstration], spec: ModelSpec) -> None:
    longest = max((len(demonstration.tokens) for demonstration in demonstrations), default=0)
    if longest > spec.max_positions:
        raise ValueError(
            f"a demonstration has {longest} tokens, beyond the {spec.max_positions} positions of the model in {spec.path}; "
            f"set data.max_tokens={spec.max_positions} with data.too_long=drop, or shorten it."
        )


def _check_evaluation(config: Config, roles: list[str], heldout: list[Prompt]) -> None:
    lacking = [role for role in ("rollout", "reward") if role not in roles]
    if heldout and config.train.eval_every and lacking:
        raise ValueError(
            f"train.eval_every={config.train.eval_every} evaluates on held-out prompts, which needs the role(s) "
            f"{', '.join(lacking)}; add them to algorithm.roles={roles}, or set train.eval_every=0."
        )


def _check_end(config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without an end token every response would run to its limit."""
    if config.sampling.stop_token_ids is None and not spec.eos_token_ids:
        raise ValueError(
            f"{spec.path}/config.json has no eos_token_id, so responses would never end; set it, or "
            f"sampling.stop_token_ids=[{tokenizer.eos_token_id}] (the tokenizer's {tokenizer.eos_token})."
        )


def _check_memory(config: Config, spec: ModelSpec, meshes: Mapping[str, Mesh], roles: list[str]) -> None:
    """Host memory on CPU-only machines: weights, gradients and optimizer state of every role on this host."""
    if torch.cuda.is_available():
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = 0.0
    for role in roles:
        mesh = meshes[role]
        if role == "reward":
            continue
        here = min(local, mesh.size)
        dense = (spec.parameters - spec.parameters_of_experts) / (mesh.tensor * mesh.pipeline)
        experts = spec.parameters_of_experts / (mesh.expert_tensor * mesh.expert * mesh.pipeline)
        for weights, copies in ((dense, mesh.data), (experts, mesh.expert_data)):
            # policy: weights, fp32 gradients, and masters with two moments over the data shards; vLLM: packed weights
            need += here * weights * {"policy": 8 + 12 / copies, "reference": 4, "rollout": 4}[role]
        if role == "rollout":
            need += here * (config.rollout.kv_cache_bytes(spec, mesh.tensor, True, mesh.pipeline) or 0)
    there_is = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there_is:
        raise ValueError(
            f"the roles on this host need about {need / 2**30:.1f} GiB, and it has {there_is / 2**30:.1f} GiB. Raise "
            "placement.policy.tensor or pipeline over more hosts, drop algorithm.roles reference, or take a smaller model."
        )


def _check_run_dir(config: Config) -> None:
    """A file without a name in the nearest folder there is: access rights alone say too little (full, read-only)."""
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"run_dir={config.run_dir} cannot be written ({folder}: {error.strerror}); choose another folder."
        ) from None


def _check_rule(reward: RewardConfig) -> None:
    """In a worker process, as it will run: only its import tells whether it can be called."""
    RulePool(reward.rule, reward.kwargs, 1, reward.timeout_s).close()


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
