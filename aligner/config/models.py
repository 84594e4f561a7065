"""Further models of a job, `models.NAME={kind: ..., path: ..., ...}`: the settings of each kind, and how they are composed.

`models` and `placement` are open to new names, which the schema of a dataclass is not: after Hydra has composed them, each
entry is merged into the dataclass of its kind, so that every field has its type, its default and its `--help`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.bounds import NotEmpty, check_settings
from aligner.rollout.config import RolloutConfig
from aligner.spmd.placement import RoleLayout, default_layout
from aligner.spmd.role_table import MODEL_KINDS, USUAL, RoleSpec, further_role
from aligner.trainer.config import CriticConfig, PolicyConfig, ReferenceConfig, RewardModelConfig


@dataclass(frozen=True)
class PolicySettings(PolicyConfig):
    """A further trained language model, with an optimizer of its own; exported to run_dir/NAME once it was updated."""

    kind: str = "policy"
    """What it is; decides which of the settings of models.NAME there are."""
    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """Hugging Face folder to start from, with the tokenizer of model.path."""


@dataclass(frozen=True)
class FrozenSettings(ReferenceConfig):
    """A frozen language model (a teacher, a second reference): `roles["NAME"].logprobs(samples)`."""

    kind: str = "frozen"
    """What it is; decides which of the settings of models.NAME there are."""
    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """Hugging Face folder, with the tokenizer of model.path."""


@dataclass(frozen=True)
class CriticSettings(CriticConfig):
    """A further value model: `roles["NAME"].values(samples)`."""

    kind: str = "critic"
    """What it is; decides which of the settings of models.NAME there are."""
    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """Hugging Face folder to start from: a language model, which gets a new head, or one for sequence classification
    with num_labels=1; with the tokenizer of model.path."""


@dataclass(frozen=True)
class RewardModelSettings(RewardModelConfig):
    """A further reward model: `roles["NAME"].scores(samples)`, or reward.components.X.model=NAME; frozen unless the loop
    updates it."""

    kind: str = "reward_model"
    """What it is; decides which of the settings of models.NAME there are."""
    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """Hugging Face folder to start from: a language model, which gets a new head, or one for sequence classification
    with num_labels=1; with the tokenizer of model.path."""


@dataclass(frozen=True)
class EngineSettings(RolloutConfig):
    """A further rollout engine: `roles["NAME"].generate(prompts)`. It has the weights of its folder (a judge), until a policy
    sends its own: `roles["actor"].reshard_to(roles["NAME"])`."""

    kind: str = "engine"
    """What it is; decides which of the settings of models.NAME there are."""
    path: Annotated[str, NotEmpty("DIR", "a folder")] = "???"
    """Hugging Face folder of its weights, configuration and tokenizer; for a policy's rollout, the policy's."""
    own_tokenizer: bool = False
    """Its tokenizer may differ from that of model.path. The loop then makes its prompts with roles["NAME"].tokenizer, and
    gives it none of the policy's tokens."""


SETTINGS: Mapping[str, type] = {
    "policy": PolicySettings,
    "frozen": FrozenSettings,
    "critic": CriticSettings,
    "reward_model": RewardModelSettings,
    "engine": EngineSettings,
}
"""Kind -> its settings."""
assert SETTINGS.keys() == MODEL_KINDS.keys()

EXPECTED = {
    "Integer": "give a whole number",
    "Float": "give a number",
    "bool": "use true or false",
    "not Optional": "give a value",
    "to Dict": "set its keys",
}
"""What would work, by a word of OmegaConf's complaint about a value."""

Mirror = Callable[[type], Any]
"""A frozen dataclass -> one that OmegaConf can write to."""


def complete_models(
    composed: DictConfig, mirror: Mirror, defaults: Callable[[str], Mapping[str, Any]] = lambda kind: {}
) -> None:
    """Give every entry of `models`, and every name of `placement` beside the usual roles, the fields of its dataclass.

    Args:
        defaults: kind of a model -> values in the place of its dataclass's.

    Raises:
        ValueError: a name that is taken, an unknown kind or key, a value of the wrong type, or a placement for a model that
            is not there.
    """
    for section in ("models", "placement"):
        if not isinstance(composed[section], DictConfig):
            raise ValueError(f"{section}={composed[section]} is not possible; set {section}.NAME={{...}}.")
    roles = {}
    for name in map(str, composed.models):
        node = composed.models[name]
        if not isinstance(node, DictConfig):
            raise ValueError(
                f"models.{name}={node} is not possible; set its keys: models.{name}={{kind: ..., path: ...}}."
            )
        roles[name] = further_role(name, str(node.get("kind") or ""))
        settings = SETTINGS[roles[name].kind.name]
        usual: DictConfig = OmegaConf.structured(mirror(settings))
        usual.merge_with(dict(defaults(roles[name].kind.name)))
        composed.models[name] = _merged(usual, node, f"models.{name}")
    for name in map(str, composed.placement):
        if name not in roles and name not in USUAL:
            raise ValueError(_no_role(name, [*USUAL, *roles]))
    for name, role in roles.items():
        composed.placement[name] = _layout(composed, role, mirror)


def _layout(composed: DictConfig, role: RoleSpec, mirror: Mirror) -> DictConfig:
    setting = f"placement.{role.name}"
    usual: DictConfig = OmegaConf.merge(OmegaConf.structured(mirror(RoleLayout)), asdict(default_layout(role)))  # type: ignore[assignment]
    if role.name not in composed.placement:
        return usual
    node = composed.placement[role.name]
    if not isinstance(node, DictConfig):
        raise ValueError(f"{setting}={node} is not possible; set its keys, such as {setting}.ranks=all.")
    return _merged(usual, node, setting)


def _merged(usual: DictConfig, node: DictConfig, setting: str) -> DictConfig:
    """The node's values over the usual ones, typed."""
    known = [str(key) for key in usual]
    for key in map(str, node):
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.6)
            advice = f"did you mean {setting}.{close[0]}?" if close else f"{setting} has {', '.join(known)}."
            raise ValueError(f"there is no setting {setting}.{key}; {advice}")
    try:
        # as plain values: OmegaConf takes two nodes of a dataclass for two types, and ${...} stays as it is written
        merged = OmegaConf.merge(usual, OmegaConf.to_container(node, resolve=False))
    except OmegaConfBaseException as error:
        raise ValueError(_explained(error, setting)) from None
    assert isinstance(merged, DictConfig)
    return merged


def _explained(error: OmegaConfBaseException, setting: str) -> str:
    """OmegaConf's complaint about a value below `setting` as one line."""
    key = f"{setting}.{error.full_key}" if error.full_key else setting
    text = str(error.msg if error.msg is not None else error).splitlines()[0].rstrip(".")
    if re.match(r"Key '\w+' not in", text):
        return f"there is no setting {key}; see --help for those of models.NAME."
    works = next((f"; {works}" for word, works in EXPECTED.items() if word in text), "")
    return f"{key}: {text}{works}."


def _no_role(name: str, roles: list[str]) -> str:
    """Said of placement.NAME without a model of that name."""
    close = difflib.get_close_matches(name, roles, 1, 0.6)
    if close:
        return f"placement.{name} is of no role: there is no models.{name}; did you mean placement.{close[0]}?"
    return (
        f"placement.{name} is of no role: there is no models.{name}; use {', '.join(roles)}, or define "
        f"models.{name}={{kind: ..., path: ...}}."
    )


def frozen_models(values: Mapping[str, Any], freeze: Callable[[type, Any, str], Any]) -> dict[str, Any]:
    """Plain values of `models` -> the settings of each."""
    return {name: freeze(SETTINGS[value["kind"]], value, f"models.{name}.") for name, value in values.items()}


def further_roles(models: Mapping[str, Any]) -> dict[str, RoleSpec]:
    """Name -> role, in the order of the configuration."""
    return {name: further_role(name, settings.kind) for name, settings in models.items()}


@contextmanager
def errors_about(role: RoleSpec, usual: str) -> Iterator[None]:
    """Around checks that are written for the role `usual`: their errors name the settings of `role`."""
    try:
        yield
    except ValueError as error:
        text = re.sub(rf"\bplacement\.{usual}\b", f"placement.{role.name}", str(error))
        raise ValueError(re.sub(rf"(?<!placement\.)\b{usual}\.", f"{role.section}.", text)) from None


def check_model_settings(models: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not possible, naming the setting and what would work."""
    for name, role in further_roles(models).items():
        with errors_about(role, "rollout"):  # relations between an engine's settings are told as the rollout's
            check_settings(models[name], role.section)
