"""The components of a reward, read from its settings and checked; and what scores each of them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aligner.bounds import check_settings
from aligner.reward.config import RewardComponent, RewardConfig
from aligner.reward.pool import RulePool
from aligner.reward.remote import HttpScorer
from aligner.reward.worker import Score

KINDS = ("rule", "url", "model", "environment")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys and values"}


class Scorer(Protocol):
    """Scores rows on this rank."""

    progress: Callable[[], None]
    """Called whenever rows have been scored, or given up."""

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score for each {'prompt': str, 'response': str, 'fields': dict}, in the same order."""
        ...

    def needs(self) -> frozenset[str]:
        """Names of the JSON fields that a row must have to be scored."""
        ...

    def under_way(self) -> list[int]:
        """Which items of the present call are being scored; asked by another thread."""
        ...

    def close(self) -> None:
        """Release resources. Idempotent."""
        ...


@dataclass(frozen=True)
class ResolvedComponent:
    """A reward component with its name and resolved settings."""

    name: str
    where: str
    """Prefix of its settings in messages: `reward` or `reward.components.NAME`."""
    component: RewardComponent
    workers: int
    timeout_s: float
    memory_mib: int | None = None
    keep_special_tokens: bool = False

    @property
    def model(self) -> str | None:
        """The role whose scores are its values; None for a rule or an endpoint."""
        model = self.component.model
        return "reward_model" if model is True else model or None

    @property
    def source(self) -> str:
        """The setting that defines where its values come from, for messages."""
        kind = _kinds(self.component)[0]
        value = getattr(self.component, kind)
        return f"{self.where}.{kind}={'true' if value is True else value}"

    def scorer(self) -> Scorer | None:
        """The scorer of this rank; None for a reward model, which is a separate role, and for an environment.

        Raises:
            ValueError: the rule cannot be imported or called; the url cannot be used.
        """
        component = self.component
        if component.rule is not None:
            memory = None if self.memory_mib is None else self.memory_mib << 20
            return RulePool(component.rule, component.kwargs, self.workers, self.timeout_s, self.where, memory)
        if component.url is not None:
            return HttpScorer(component, self.where, self.workers, self.timeout_s)
        return None


def reward_components(reward: RewardConfig) -> list[ResolvedComponent]:
    """The components in order; a reward of a single rule is one component of weight 1, named after the function.

    Raises:
        ValueError: a setting that is unknown, of the wrong type or out of range; names the values that would work.
    """
    if not reward.components:
        name = re.split(r"[.:]", reward.rule)[-1] or "rule"
        component = RewardComponent(rule=reward.rule, kwargs=reward.kwargs)
        keep_special_tokens = reward.keep_special_tokens
        return [
            ResolvedComponent(
                name, "reward", component, reward.workers, reward.timeout_s, reward.memory_mib, keep_special_tokens
            )
        ]
    with_rule = reward.rule not in ("", RewardConfig.rule)
    if with_rule or reward.kwargs:
        setting = f"reward.rule={reward.rule}" if with_rule else f"reward.kwargs={reward.kwargs}"
        raise ValueError(
            f"{setting} is for a reward of a single rule, but reward.components={', '.join(reward.components)} are given; "
            "make it a component too, reward.components.NAME.rule=... with its kwargs, or remove it: reward.rule=''."
        )
    parts = []
    for name, values in reward.components.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", str(name)):
            raise ValueError(f"reward.components.{name}: a component's name is a word of letters, digits and _.")
        where = f"reward.components.{name}"
        component = _read(RewardComponent, values, where)
        workers = reward.workers if component.workers is None else component.workers
        timeout_s = reward.timeout_s if component.timeout_s is None else component.timeout_s
        keep_special_tokens = component.keep_special_tokens
        keep_special_tokens = reward.keep_special_tokens if keep_special_tokens is None else keep_special_tokens
        parts.append(
            ResolvedComponent(str(name), where, component, workers, timeout_s, reward.memory_mib, keep_special_tokens)
        )
    for part in parts:
        _check(part, [other.name for other in parts])
    if all(part.component.weight == 0 for part in parts):
        raise ValueError("every reward.components.*.weight is 0, so every reward would be 0; set one to 1.")
    return parts


def shown_component(reward: RewardConfig, named: str | None) -> str | None:
    """The component whose raw value evaluations report; None: the whole reward.

    A batch's normalised rewards have the mean 0, whatever the answers are worth: then it is the only component's value.

    Args:
        named: train.eval_reward.

    Raises:
        ValueError: there are several components, one of them normalised, and none is named.
    """
    parts = reward_components(reward)
    if named is not None or all(part.component.normalize == "none" for part in parts):
        return named
    if len(parts) > 1:
        raise ValueError(
            "train.eval_reward=null: the reward is normalised over each batch, so that its mean in an evaluation says "
            f"nothing; name one of its components: {', '.join(part.name for part in parts)}."
        )
    return parts[0].name


def _kinds(component: RewardComponent) -> list[str]:
    return [kind for kind in KINDS if getattr(component, kind)]


def _check(part: ResolvedComponent, names: Sequence[str]) -> None:
    component, where = part.component, part.where
    given = _kinds(component)
    if len(given) != 1:
        sources = f"has {' and '.join(given)}" if given else "has none"
        raise ValueError(
            f"{where} {sources}; give exactly one of rule, url, model=true (or model=NAME) and environment=true."
        )
    check_settings(component, where)
    if component.clip is not None and not (len(component.clip) == 2 and component.clip[0] < component.clip[1]):
        raise ValueError(f"{where}.clip={list(component.clip)} must be [low, high] with low < high, such as [-5, 5].")
    if component.gate is not None and (component.gate not in names or component.gate == part.name):
        others = [name for name in names if name != part.name]
        works = f"use one of {', '.join(others)}" if others else "there is no other; leave gate out"
        raise ValueError(f"{where}.gate={component.gate} is no other component; {works}.")
    if component.gate is None and (component.gate_above or component.gate_value):
        raise ValueError(f"{where}.gate_above and gate_value say nothing without {where}.gate; name a component there.")
    if component.kwargs and component.rule is None:
        raise ValueError(f"{where}.kwargs are arguments of a rule, and this is a {given[0]}; leave them out.")
    if component.model and component.keep_special_tokens is not None:
        raise ValueError(f"{where}.keep_special_tokens: the reward model reads tokens, not text; leave it out.")
    if component.environment and component.keep_special_tokens is not None:
        raise ValueError(f"{where}.keep_special_tokens: the environment's reward is read, no text; leave it out.")
    if component.url is None and (component.judge or component.token_env):
        raise ValueError(f"{where}.judge and token_env belong to an endpoint; set {where}.url.")


def _read(kind: Any, values: Any, where: str) -> Any:
    """Plain values -> a frozen dataclass, every type checked: below `components` the schema of OmegaConf ends."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values} is not possible; set one of its keys: {', '.join(hints)}.")
    settings = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"there is no setting {where}.{key}; {where} has {', '.join(hints)}.")
        settings[key] = _typed(value, hints[key], f"{where}.{key}")
    return kind(**settings)


def _typed(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    option = options[0]
    if dataclasses.is_dataclass(option):
        return _read(option, value, where)
    origin = typing.get_origin(option) or option
    if origin is tuple:
        if isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value):
            return tuple(float(item) for item in value)
        raise ValueError(f"{where}={value} is not possible; give a list of two numbers.")
    if origin is float and type(value) is int:
        return float(value)
    plain = [typing.get_origin(one) or one for one in options if one is not type(None)]
    if type(value) not in plain:
        raise ValueError(f"{where}={value} is not possible; give {' or '.join(WORDS[one] for one in plain)}.")
    return value
