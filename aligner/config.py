"""The whole configuration as one frozen dataclass: composed by Hydra, checked once, before any process group is made."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.driver.config import LoggingConfig
from aligner.policy.config import PolicyConfig
from aligner.reward.config import RewardConfig
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.spmd.placement import Placement

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class ModelConfig:
    """The checkpoint to start from."""

    path: str = "???"
    """A local Hugging Face folder: config.json, safetensors, tokenizer."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on: JSONL files, or a generated task."""

    path: str | None = None
    """JSONL file of prompts ({"prompt"} or {"messages"}, with the fields that the reward needs) or demonstrations."""
    eval_path: str | None = None
    """JSONL file of held-out prompts; none: no evaluation."""
    task: Any = None
    """A generated task in place of files, as a `_target_` (see data=column_addition)."""
    kind: str = "prompts"
    """What the loop trains on: prompts (to sample from) or demonstrations (to imitate)."""
    prompts_per_step: int = 32
    """Prompts (or demonstrations) in one step."""
    max_prompt_tokens: int = 512
    """Longest prompt allowed, in tokens."""
    max_tokens: int = 1024
    """Longest demonstration allowed, in tokens."""
    too_long: str = "error"
    """Demonstrations longer than max_tokens: error or drop."""
    shuffle: bool = True
    """A new order in each epoch."""
    eval_prompts: int = 256
    """Held-out prompts used in an evaluation, at most."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is done beside training."""

    steps: int = 100
    """Iterations of the loop."""
    eval_every: int = 10
    """Iterations between evaluations on held-out prompts (also before the first and after the last); 0: never."""
    eval_temperature: float = 1.0
    """Sampling temperature in evaluations; 0 is greedy."""
    save: bool = True
    """Write run_dir/model, a Hugging Face checkpoint, at the end."""
    report: bool = True
    """Write run_dir/report.html and a PNG of the learning curve at the end."""


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
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The vLLM engine."""
    sampling: Sampling = field(default_factory=Sampling)
    """How training responses are drawn."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The rule and its worker processes."""
    placement: Placement = field(default_factory=Placement)
    """Which ranks each role has."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, wandb, samples."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, evaluation, what is written at the end."""
    seed: int = 0
    """Seeds the data order and the sampling."""
    run_dir: str = "runs/latest"
    """Folder for metrics, samples, report and checkpoint."""
    overwrite: bool = False
    """Replace the run that run_dir already holds."""
    timeout_seconds: float = 1800.0
    """A collective that takes longer ends the job, in seconds."""


def compose_config(overrides: Sequence[str], name: str = "train", folder: Path = CONF) -> DictConfig:
    """Compose conf/<name>.yaml with Hydra overrides, every value checked against the dataclasses' types.

    Raises:
        ValueError: an unknown group, file or key, or a value of the wrong type; close names are offered.
    """
    ConfigStore.instance().store(name="schema", node=_writable(Config))
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return compose(config_name=name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides, name, folder)) from None


def to_config(composed: DictConfig) -> Config:
    """The frozen dataclass.

    Raises:
        ValueError: a field without a value.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{missing[0]} has no value; give it on the command line: {missing[0]}=...")
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None
    config = _frozen(Config, values)
    assert isinstance(config, Config)
    return config


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of a hint such as `X` or `X | None`; None where there is none."""
    return next((option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)), None)


def _writable(kind: Any) -> Any:
    """The same dataclass unfrozen: OmegaConf takes frozen ones for read-only, and Hydra must write the overrides."""
    hints = typing.get_type_hints(kind)
    entries = []
    for entry in dataclasses.fields(kind):
        hint, inner = hints[entry.name], _dataclass_in(hints[entry.name])
        factory = entry.default_factory if entry.default_factory is not dataclasses.MISSING else partial(_same, entry.default)
        if inner is not None:
            hint = _writable(inner)
            factory = partial(_mirrored, hint, factory)
        entries.append((entry.name, hint, field(default_factory=factory)))
    return dataclasses.make_dataclass(kind.__name__, entries)


def _same(value: Any) -> Any:
    return value


def _mirrored(mirror: Any, factory: Any) -> Any:
    """The default of a nested dataclass, as its unfrozen mirror."""
    return OmegaConf.merge(OmegaConf.structured(mirror), dataclasses.asdict(factory()))


def _frozen(kind: Any, values: Any) -> Any:
    """Plain values -> the frozen dataclass."""
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} stands where settings of {kind.__name__} belong; set one of its fields.")
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"there is no setting {name} in {kind.__name__}; it has {', '.join(hints)}.")
        inner = _dataclass_in(hints[name])
        made[name] = _frozen(inner, value) if inner is not None else tuple(value) if isinstance(value, list) else value
    return kind(**made)


def known_keys(name: str, folder: Path) -> list[str]:
    """Every dotted key of the configuration without overrides."""
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        whole = compose(config_name=name)
    found: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            found.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{prefix}{key}.")

    walk(whole, "")
    return found


def _explain(error: Exception, overrides: Sequence[str], name: str, folder: Path) -> str:
    """One line that names the override and what would work."""
    text = " ".join(str(error).split())
    causes = [text]
    inner = error.__cause__ or error.__context__
    if inner is not None:
        causes.append(" ".join(str(inner).split()))
    whole = " ".join(causes)
    option = re.search(r"Could not override '([^']+)'", whole) or re.search(r"full_key: ([\w.]+)", whole)
    key = option.group(1).lstrip("+~@") if option else ""
    given = next((o for o in overrides if key and re.split(r"[=@]", o.lstrip("+~"))[0] == key), None)
    if option and ("not in" in whole or "is not in struct" in whole):
        close = difflib.get_close_matches(key, known_keys(name, folder), 3, 0.6)
        advice = f"did you mean {' or '.join(close)}?" if close else "see --help for every key."
        if key.startswith(("algorithm.", "reward.kwargs")):
            advice += f" +{key}=... adds it."
        return f"{given or key}: there is no setting {key}; {advice}"
    if "Could not find" in text:
        group = re.search(r"Could not find '([^']+)'", text)
        listed = re.search(r"Available options in '[^']+': (.*?) Config search path", text)
        available = ", ".join(re.findall(r"[\w-]+", listed.group(1))) if listed else "see --help"
        return f"{group.group(1) if group else text}: no such configuration; available: {available}."
    value = next((c for c in causes if "could not be converted" in c or "not assignable" in c or "not a subclass" in c), text)
    value = re.split(r"\s+full_key:", value)[0]
    return f"{given or key or 'configuration'}: {value}"
