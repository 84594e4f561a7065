"""Everything that can be known wrong before a model is built or a process group made."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.bounds import check_settings
from aligner.check.best_metric import best_metric_of
from aligner.check.disk import bytes_needed, check_disk
from aligner.check.memory import Machine, check_memory, machine_of
from aligner.check.peak import check_peak
from aligner.check.quantization import check_quantization
from aligner.check.roles import check_engines, check_ranks, check_roles, check_scorer, check_tokenizers, model_of
from aligner.check.rollout import (
    answered_prompts,
    check_end,
    check_environment,
    check_lengths,
    ends_of,
    sized,
    sized_engines,
    with_ends,
)
from aligner.check.run_folder import check_places, check_sources
from aligner.check.shared_weights import check_shared_weights
from aligner.checkpoint.claim import how_to_start, launch
from aligner.checkpoint.lease import check_free
from aligner.config.models import check_model_settings
from aligner.config.schema import Config
from aligner.data.end_tokens import EndTokens, special_ids
from aligner.data.named_sources import named_sources
from aligner.data.prompts import Prompt
from aligner.data.sets import DataSets, known_rows, training_sources
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.data.tokenizer import load_tokenizer, use_chat_template
from aligner.environments.pool import check_start
from aligner.models.agreement import check_reading
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.verify_checkpoint import check_weights
from aligner.reward.components import ResolvedComponent, reward_components, shown_component
from aligner.roles.episode_source import check_conversations
from aligner.rollout import engines
from aligner.rollout.config import RolloutConfig
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import make_meshes, role_layout
from aligner.trainer.engines import backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checked:
    """What the checks have read, ready for the roles."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    meshes: Mapping[str, Mesh]
    data: DataSets
    specs: Mapping[str, ModelSpec]
    """The model of each role that has one."""
    ends: EndTokens
    """What ends a turn."""
    rollout: RolloutConfig
    """The rollout's settings, with a length."""
    models: Mapping[str, Any]
    """The settings of further models; engines have a length."""
    best_metric: str | None = None
    """The metric that chooses the best export; None: train.keep_best is false."""

    @property
    def heldout(self) -> list[Prompt]:
        """Prompts to evaluate on."""
        return self.data.heldout


@dataclass(frozen=True)
class Models:
    """What is known of a job before its data are read."""

    spec: ModelSpec
    """The model in model.path."""
    specs: Mapping[str, ModelSpec]
    """The model of each role that has one."""
    tokenizer: PreTrainedTokenizerBase
    meshes: Mapping[str, Mesh]
    machine: Machine
    world_size: int
    """Ranks of the job."""
    rollout: RolloutConfig
    """The rollout's settings, with a length."""
    further: Mapping[str, Any]
    """The settings of further models; engines have a length."""


def check_models(config: Config, roles: list[str], world_size: int) -> Models:
    """Check everything that needs no data: settings, folders, placement, the models' configurations, their tokenizers.

    Args:
        roles: the roles that the loop wants.

    Raises:
        ValueError: the first thing found wrong, with the setting and the values that would work.
    """
    _check_values(config)
    check_roles(config, roles)
    if config.data.curriculum.by == "success" and "reward" not in roles:
        raise ValueError(
            f"data.curriculum.by=success measures prompts by the rewards of their samples; add reward to algorithm.roles={roles}, or "
            "use data.curriculum.by=none."
        )
    _check_places(config, roles)
    config.residency.check_roles([config.role(role) for role in roles])
    check_ranks(config.placement)
    meshes = make_meshes(config.placement, world_size, config.roles)
    machine = machine_of(config, world_size)
    spec = read_spec(config.model.path, config.model.trust_remote_code)
    specs = {role: model_of(config, role) for role in roles if config.role(role).kind.head}
    rollout = sized(config, specs, meshes)
    for role in (role for role in roles if config.role(role).kind.on_trainer):
        parallel = role_layout(config.placement, config.role(role)).sequence_parallel
        settings = config.settings(role)
        backend(settings.engine).check(specs[role], meshes[role], settings, parallel, machine.cpu)
    for model in {spec.path: spec for spec in specs.values()}.values():
        check_reading(model)
    tokenizer = load_tokenizer(config.model.path)
    if config.data.chat_template is not None:
        use_chat_template(tokenizer, config.data.chat_template)
    check_tokenizers(config, roles, tokenizer)
    for path in dict.fromkeys(one.path for one in (spec, *specs.values())):
        special_ids(path)
    return Models(spec, specs, tokenizer, meshes, machine, world_size, rollout, sized_engines(config, specs, meshes))


def check_job(config: Config, roles: list[str], models: Models, data: DataSets) -> Checked:
    """Check models, data, memory, disk and rewards against each other.

    Args:
        config: as `check_models` was given it.
        data: what `read_sets` has read, with `models.tokenizer`.

    Raises:
        ValueError: the first thing found wrong, with the setting and the values that would work.
    """
    given, config = config.rollout.max_model_len, replace(config, rollout=models.rollout, models=dict(models.further))
    spec, specs, tokenizer, meshes = models.spec, models.specs, models.tokenizer, models.meshes
    _check_minibatches(config, roles)
    ends = ends_of(config, tokenizer, data)
    for role in specs:
        _check_positions(config, role, data.longest, specs)
    if config.data.kind == "prompts":
        _check_evaluation(config, roles, data.heldout)
    if "rollout" in roles:
        data = answered_prompts(config, data)
    best_metric = best_metric_of(config.train, roles, data)
    check_environment(config, roles)
    check_conversations(config, tokenizer)
    if config.environment.target and os.environ.get("LOCAL_RANK", "0") == "0":  # a process of each node can start
        check_start(config.environment)
    if "rollout" in roles:
        engines.backend(config.rollout.engine).check(spec, meshes["rollout"], config.rollout, models.machine.cpu)
        check_shared_weights(config, roles, meshes)
        check_quantization(config, specs, meshes)
        check_lengths(config, data, specs, given)
        check_end(config, spec, tokenizer)
    check_engines(config, specs, meshes, models.machine)
    check_memory(config, specs, meshes, models.machine)
    check_peak(config, roles, specs, meshes, data, models.machine)
    for role in specs:
        if config.role(role).kind.on_trainer or role in config.models:
            check_weights(specs[role])
    _check_run_dir(config)
    check_disk(config, bytes_needed(config, roles, specs, models.world_size))
    if "reward" in roles:
        _check_reward(config, roles, data)
        if config.train.eval_every and data.heldout:
            shown_component(config.reward, config.train.eval_reward)
    spec = with_ends(spec, config, ends, tokenizer)
    return Checked(spec, tokenizer, meshes, data, specs, ends, config.rollout, config.models, best_metric)


def _check_values(config: Config) -> None:
    check_settings(config)
    check_model_settings(config.models)
    if os.environ.get("GROUP_RANK", "0") == "0":  # the host whose launcher owns the folder
        if os.environ.get("RANK", "0") == "0":
            check_free(Path(config.run_dir), launch())
        how_to_start(Path(config.run_dir), config.checkpoint, config.overwrite, config.train.steps)
    sampling = config.sampling
    if sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 leaves nothing to compare in a group; use a positive one (1.0 is usual)."
        )
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        raise ValueError(
            f"sampling.top_p={sampling.top_p}, sampling.top_k={sampling.top_k}: the policy's log-probabilities are over "
            "the whole vocabulary, so training samples must be drawn from it too; use top_p=1 and top_k=0."
        )


def _check_minibatches(config: Config, roles: list[str]) -> None:
    """More optimizer steps than groups of rows would leave some of them without any."""
    groups = config.data.prompts_per_step
    for role in (config.role(name) for name in roles if config.role(name).kind.learns != "never"):
        minibatches = config.settings(role.name).minibatches
        if minibatches > groups:
            raise ValueError(
                f"{role.section}.minibatches={minibatches} is more than the {groups} of data.prompts_per_step={groups}, and each "
                f"optimizer step needs a prompt (with all its responses) or row of its own; use 1 to {groups}."
            )


def _check_positions(config: Config, role: str, longest: int, specs: Mapping[str, ModelSpec]) -> None:
    spec = specs[role]
    length, kind = config.rollout.max_model_len, config.role(role).kind
    if role in config.models and kind.runs_on == "engine":
        return  # it reads what the loop asks of it
    if kind.head == "scalar" and "rollout" in specs and length is not None and length > spec.max_positions:
        raise ValueError(
            f"rollout.max_model_len={length} is beyond the {spec.positions_text}, the {role}, "
            f"which reads whole samples; use {spec.max_positions} or less."
        )
    if longest > spec.max_positions:
        has = "may have" if longest == config.data.max_tokens else "has"  # what rows of a streamed set are allowed
        row_kind = "a demonstration" if config.data.kind == "demonstrations" else "an answer with its prompt"
        raise ValueError(
            f"{row_kind} {has} {longest} tokens, beyond the {spec.positions_text}; "
            f"set data.max_tokens={spec.max_positions} with data.too_long=drop, or shorten it."
        )


def _check_evaluation(config: Config, roles: list[str], heldout: list[Prompt]) -> None:
    lacking = [role for role in ("rollout", "reward") if role not in roles]
    if heldout and config.train.eval_every and lacking:
        raise ValueError(
            f"train.eval_every={config.train.eval_every} evaluates on held-out prompts, which needs the role(s) "
            f"{', '.join(lacking)}; add them to algorithm.roles={roles}, or set train.eval_every=0."
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


def _check_places(config: Config, roles: Collection[str]) -> None:
    """What the run replaces is its own, and none of what it reads."""
    sources: dict[str, str | None] = dict(config.model_path(role) for role in roles if config.role(role).kind.head)
    given: dict[str, Any] = {"data.eval_path": config.data.eval_path, "data.chat_template": config.data.chat_template}
    if config.data.task is None:
        given |= {source.setting: source.data.path for source in named_sources(config.data)}
    for setting, path in given.items():
        several = [] if isinstance(path, str) else enumerate(path or ())
        sources |= {f"{setting}[{number}]": one for number, one in several} or {setting: path or None}
    if "reward" in roles:
        rules = {f"{part.where}.rule": part.component.rule or "" for part in reward_components(config.reward)}
        sources |= {setting: rule.rpartition(":")[0] for setting, rule in rules.items() if ".py:" in rule}
    learning = [role for role in config.roles if role in roles and config.learns(role, roles)]
    check_sources(config, sources, learning)
    if os.environ.get("GROUP_RANK", "0") == "0":
        check_places(config, learning)


def _check_reward(config: Config, roles: list[str], data: DataSets) -> None:
    """Rules in a worker process, as they will run: only their import tells whether they can be called."""
    parts, named = reward_components(config.reward), config.train.eval_reward
    names = [part.name for part in parts]
    if named is not None and named not in names:
        raise ValueError(f"train.eval_reward={named} is no component of the reward; use {', '.join(names)}, or null.")
    config.hang.check_scoring(max(part.timeout_s for part in parts))
    for part in parts:
        check_scorer(config, part, roles)
        if part.component.environment and not config.environment.enabled:
            raise ValueError(
                f"{part.source} reads the rewards of episodes; set environment.target or environment.agent.command, or use another reward."
            )
        scorer = replace(part, workers=1).scorer()
        if scorer is not None:
            with contextlib.closing(scorer):
                _check_fields(part, scorer.needs(), config, data)


def _check_fields(part: ResolvedComponent, needed: frozenset[str], config: Config, data: DataSets) -> None:
    """Rows without a field that the reward needs would all fail, batch after batch."""
    task = f"data.task={type(config.data.task).__name__}" if config.data.task else None
    training = zip(training_sources(config.data), data.parts.values(), strict=True)
    sources: list[tuple[str, Sequence[Any]]] = [
        *((task or source, known_rows(part)) for source, part in training),
        (task or f"data.eval_path={config.data.eval_path}", data.heldout),
    ]
    for source, rows in sources:
        fields = [row.fields for row in rows if isinstance(row, (Prompt, TokenizedAnswer))]
        for name in sorted(needed - {"prompt"}):  # which every row has, as text
            lacking = [number for number, has in enumerate(fields, start=1) if name not in has]
            if lacking:
                works = f" or set {part.where}.kwargs.{name}" if part.component.rule is not None else ""
                raise ValueError(
                    f"{part.source} needs the field {name!r} of each row, and {len(lacking)} of the {len(fields)} rows of "
                    f"{source} lack it (the first: row {lacking[0]}, which has {', '.join(rows[lacking[0] - 1].fields)}); "
                    f"add it to the rows{works}."
                )
