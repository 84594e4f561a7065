"""The whole configuration as one frozen dataclass: composed by Hydra, checked once, before any process group is made."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.bounds import AtLeast, Between, NotEmpty, OneOf, dataclass_in
from aligner.checkpoint.config import CheckpointConfig
from aligner.config.check import CheckConfig
from aligner.config.device_defaults import DEFAULTS, section_defaults
from aligner.config.guards import GuardConfig
from aligner.config.models import EXPECTED, complete_models, frozen_models, further_roles
from aligner.config.run import TrainConfig
from aligner.data.config import DataConfig
from aligner.environments.config import EnvironmentConfig
from aligner.health.config import HangConfig
from aligner.paths import expand_composed, expand_values, quoted_tilde
from aligner.report.config import LoggingConfig
from aligner.reshard.config import ReshardConfig
from aligner.reward.config import RewardConfig
from aligner.rollout.config import RolloutConfig, Sampling, StreamConfig
from aligner.spmd.device import device_type
from aligner.spmd.placement import RoleLayout, usual_placement
from aligner.spmd.residency_config import ResidencyConfig
from aligner.spmd.role_table import USUAL, RoleSpec, learns
from aligner.trainer.config import CriticConfig, PolicyConfig, ReferenceConfig, RewardModelConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class ModelConfig:
    """The checkpoint to start from."""

    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """A local Hugging Face folder: config.json, safetensors, tokenizer."""
    trust_remote_code: bool = False
    """Run the model class in the Python files of a folder whose config.json names it in auto_map, for every model of the job
    (engine=fsdp, rollout.engine=transformers, and vLLM where it can run the class). Read the files first: they do what they like."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    algorithm: dict[str, Any] = field(default_factory=dict)
    """The loop (`_target_`) and its own settings."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and held-out data."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The trained model, its optimizer and microbatches."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The frozen copy of the starting model (role reference)."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value model (role critic)."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """The model that scores responses (role reward_model)."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout engine."""
    sampling: Sampling = field(default_factory=Sampling)
    """How training responses are drawn."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How far generation runs ahead of training."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The rule and its worker processes."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What the policy talks with for several turns, in processes of its own."""
    models: dict[str, Any] = field(default_factory=dict)
    """Further models by name, {kind, path, ...}: `roles["NAME"]` in a loop. See models.NAME below."""
    placement: dict[str, RoleLayout] = field(default_factory=usual_placement)
    """Which ranks each role has; placement.NAME is that of models.NAME."""
    reshard: ReshardConfig = field(default_factory=ReshardConfig)
    """How weights get from the policy to the rollout engines."""
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    """How roles on the same ranks share their memory."""
    hang: HangConfig = field(default_factory=HangConfig)
    """When a job that stands still is ended, with a report of every rank."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, wandb, samples."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """Signs of a run that has gone wrong, and what is done then."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, evaluation, what is written at the end."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What a run can be continued from."""
    mode: Annotated[str, OneOf("train", "check")] = "train"
    """train, or check: find every mistake that can be found before models are built, say what the job needs, and leave."""
    check: CheckConfig = field(default_factory=CheckConfig)
    """mode=check: which machine the job is for."""
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0
    """Seeds the data order and the sampling."""
    run_dir: Annotated[str, NotEmpty("runs/first", "a folder")] = "runs/latest"
    """Folder for metrics, samples, report and checkpoint. In this and every other path ~ and $NAME are replaced."""
    overwrite: bool = False
    """Start anew, and replace the run that run_dir already holds; restarts of this launch go on with it."""
    timeout_seconds: Annotated[float, AtLeast(1)] = 1800.0
    """A collective that takes longer ends the job, in seconds."""

    @property
    def roles(self) -> dict[str, RoleSpec]:
        """Every role that this configuration describes, by name: the usual ones, then those of `models`."""
        return USUAL | further_roles(self.models)

    def role(self, name: str) -> RoleSpec:
        """The role of this name."""
        return USUAL[name] if name in USUAL else further_roles(self.models)[name]

    def settings(self, role: str) -> Any:
        """The settings of a role with a model: its section, or `models.NAME`; what a frozen one leaves out is as the
        policy's."""
        settings = self.models[role] if role in self.models else getattr(self, role)
        return settings.over(self.policy) if isinstance(settings, ReferenceConfig) else settings

    def model_path(self, role: str) -> tuple[str, str]:
        """(setting, folder) of what a role with a model starts from."""
        own = getattr(self.models.get(role) or getattr(self, role, None), "path", None)
        return (f"{self.role(role).section}.path", own) if own else ("model.path", self.model.path)

    def learns(self, role: str, roles: Iterable[str]) -> bool:
        """Whether a job with these roles trains this one; see `RoleKind.learns`."""
        return learns(self.role(role), {name: self.role(name) for name in roles})


def compose_config(overrides: Sequence[str], name: str = "train", folder: Path = CONF) -> DictConfig:
    """Compose conf/<name>.yaml with Hydra overrides, every value checked against the dataclasses' types, ~ and
    environment variables in paths replaced. What is left open has the default of the job's device (`device_defaults`).

    Raises:
        ValueError: a malformed override, an unknown group, file or key, or a value of the wrong type; close names are
            offered.
    """
    if not folder.is_dir():
        raise ValueError(f"--config-dir={folder} is not a folder; give one that holds {name}.yaml, or leave it out.")
    if not (folder / f"{name}.yaml").is_file():
        raise ValueError(f"--config-name={name}: there is no {folder / name}.yaml; available: {_options(folder)}.")
    overrides = [quoted_tilde(override) for override in overrides]
    device = device_type()
    composed = _composed(overrides, name, folder, device)
    if device == "cpu" and composed.mode == "check" and composed.check.device_gib is not None:  # a job for GPUs
        composed = _composed(overrides, name, folder, "cuda")
    expand_composed(composed)
    return composed


def _composed(overrides: list[str], name: str, folder: Path, device: str) -> DictConfig:
    """With the defaults of a device, cpu or cuda."""
    ConfigStore.instance().store(name="schema", node=_schema(device))
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = compose(config_name=name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _check_forms(overrides)
        raise ValueError(_explain(error, overrides, name, folder)) from None
    try:
        complete_models(composed, _writable, lambda kind: section_defaults(device, kind))
    except OmegaConfBaseException as error:  # ${...} of a whole model that leads nowhere
        raise ValueError(" ".join(str(error).split())) from None
    return composed


@cache
def _schema(device: str) -> DictConfig:
    """What Hydra composes on: every setting with its type and its default for a device; Hydra takes a copy."""
    usual: DictConfig = OmegaConf.structured(_writable(Config))
    usual.merge_with({section: dict(values) for section, values in DEFAULTS[device].items()})
    return usual


def to_config(composed: DictConfig) -> Config:
    """The frozen dataclass.

    Raises:
        ValueError: a field without a value.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{missing[0]} has no value; give it on the command line: {missing[0]}=...")
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None
    expand_values(values)
    config = _frozen(Config, values)
    assert isinstance(config, Config)
    return config


def _writable(kind: Any) -> Any:
    """The same dataclass unfrozen: OmegaConf takes frozen ones for read-only, and Hydra must write the overrides."""
    hints = typing.get_type_hints(kind)
    entries = []
    for entry in dataclasses.fields(kind):
        hint, inner = hints[entry.name], dataclass_in(hints[entry.name])
        factory = (
            entry.default_factory if entry.default_factory is not dataclasses.MISSING else partial(_same, entry.default)
        )
        if kind is DataConfig and entry.name == "sources":
            hint, factory = Any, partial(OmegaConf.create, {}, flags={"struct": False})
        elif kind is Config and entry.name in OPEN:
            hint, factory = Any, partial(_open, factory)
        elif inner is not None:
            hint = _writable(inner)
            factory = partial(_mirrored, hint, factory)
        entries.append((entry.name, hint, field(default_factory=factory)))
    return dataclasses.make_dataclass(kind.__name__, entries)


OPEN = ("models", "placement")
"""Fields of `Config` that take new names; see `complete_models`."""


def _open(factory: Any) -> Any:
    """A default whose entries have their types, and which takes further ones."""
    usual = {name: _mirrored(_writable(type(value)), partial(_same, value)) for name, value in factory().items()}
    return OmegaConf.create(usual, flags={"struct": False})


def _same(value: Any) -> Any:
    return value


def _mirrored(mirror: Any, factory: Any) -> Any:
    """The default of a nested dataclass, as its unfrozen mirror."""
    return OmegaConf.merge(OmegaConf.structured(mirror), dataclasses.asdict(factory()))


def _frozen(kind: Any, values: Any, prefix: str = "") -> Any:
    """Plain values -> the frozen dataclass; `prefix` is where it stands, such as "policy."."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1]}={values} is not possible; set one of its fields: {', '.join(hints)}.")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if kind is Config and name == "models":
            made[name] = frozen_models(value, _frozen)
            continue
        if kind is Config and name == "placement":
            made[name] = {role: _frozen(RoleLayout, layout, f"placement.{role}.") for role, layout in value.items()}
            continue
        if name not in hints:
            raise ValueError(
                f"there is no setting {prefix}{name}; {prefix[:-1] or 'the top level'} has {', '.join(hints)}."
            )
        inner = dataclass_in(hints[name])
        made[name] = (
            _frozen(inner, value, f"{prefix}{name}.")
            if inner is not None
            else tuple(value)
            if isinstance(value, list)
            else value
        )
    return kind(**made)


def known_keys(name: str, folder: Path) -> list[str]:
    """Every dotted key of the configuration without overrides."""
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        whole = compose(config_name=name)
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{prefix}{key}.")

    walk(whole, "")
    return keys


def _check_forms(overrides: Sequence[str]) -> None:
    """Name the override that is none: Hydra's own error shows a place in its grammar."""
    parser = OverridesParser.create()
    for override in overrides:
        try:
            formed = bool(parser.parse_override(override).key_or_group)
        except HydraException:
            formed = False
        if not formed:
            raise ValueError(
                f"{override!r} is not a setting; write KEY=VALUE, and put values with blanks or any of ={{}}[](),: in quotes "
                "of their own: \"KEY='VALUE'\"."
            )


def _options(folder: Path) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"


def _explain(error: Exception, overrides: Sequence[str], name: str, folder: Path) -> str:
    """One line that names the override and what would work."""
    text = " ".join(str(error).split())
    inner = error.__cause__ or error.__context__
    reason = " ".join(str(inner).split()) if inner is not None else text
    option = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: ([\w.]+)", f"{text} {reason}")
    key = option.group(1).lstrip("+~@") if option else ""
    merged = re.fullmatch(r"Error merging override (.*)", text)
    given = merged.group(1) if merged else next((o for o in overrides if key and _key(o) == key), None)
    if option and ("not in" in reason or "is not in struct" in reason):
        return f"{given or key}: there is no setting {key}; {_advice(key, name, folder)}"
    chosen = next((o for o in overrides if (folder / _key(o)).is_dir()), "")
    if "Config group override must be" in text:
        return f"{chosen}: no such configuration; available: {_options(folder / _key(chosen))}."
    group = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if group:
        return f"{group.group(1)}: no such configuration; available: {_options((folder / group.group(1)).parent)}."
    value = re.split(r"\s+full_key:", reason if text.startswith("Error merging") else text)[0]
    works = next((f"; {works}" for word, works in EXPECTED.items() if word in value), "")
    return f"{given or key or 'configuration'}: {value.rstrip('.')}{works}."


def _key(override: str) -> str:
    return re.split(r"[=@]", override.lstrip("+~"))[0]


def _advice(key: str, name: str, folder: Path) -> str:
    close = difflib.get_close_matches(key, known_keys(name, folder), 3, 0.6)
    advice = f"did you mean {' or '.join(close)}?" if close else "see --help for every key."
    return (
        f"{advice} +{key}=... adds it."
        if key.startswith(("algorithm.", "reward.kwargs", "reward.components", "data.chat_template_kwargs"))
        else advice
    )
