"""Components read from settings: shipped configurations are whole, mistakes name the setting and what would work."""

from __future__ import annotations

from typing import Any

import pytest

from aligner.config.schema import CONF, compose_config, to_config
from aligner.reward.components import reward_components
from aligner.reward.config import JudgeConfig, RewardComponent, RewardConfig

SHIPPED = sorted(file.stem for file in (CONF / "reward").glob("*.yaml"))


def shipped(name: str, *overrides: str) -> RewardConfig:
    return to_config(compose_config(["model.path=folder", f"reward={name}", *overrides])).reward


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_reward_is_whole(name: str) -> None:
    assert reward_components(shipped(name))


def test_what_the_shipped_ones_say() -> None:
    assert {"code", "http", "judge", "math", "model", "weighted"} <= set(SHIPPED)
    answer, form = reward_components(shipped("weighted", "reward.workers=3"))
    assert (answer.name, answer.component.weight, answer.timeout_s, answer.workers) == ("answer", 1.0, 10.0, 3)
    assert (form.component.gate, form.component.gate_above, form.timeout_s) == ("answer", 0.5, 5.0)
    (model,) = reward_components(shipped("model"))
    assert model.component.model and model.component.clip == (-20.0, 20.0)
    assert model.scorer() is None and model.model == "reward_model"
    helpful, safe = reward_components(shipped("two_models"))
    assert (helpful.model, helpful.component.gate, safe.model, safe.component.weight) == (
        "helpful",
        "safe",
        "safe",
        0.5,
    )
    assert safe.scorer() is None and safe.source == "reward.components.safe.model=safe"
    assert model.source == "reward.components.model.model=true"
    (environment,) = reward_components(shipped("environment"))
    assert environment.component.environment and environment.scorer() is None and environment.model is None
    assert environment.source == "reward.components.environment.environment=true"
    (judge,) = reward_components(shipped("judge"))
    assert isinstance(judge.component.judge, JudgeConfig)


def test_components_from_the_command_line() -> None:
    overrides = ["reward.components.http.url=https://host/x", "+reward.components.http.weight=2", "reward.workers=7"]
    (part,) = reward_components(shipped("http", *overrides))
    assert (part.component.url, part.component.weight, part.workers) == ("https://host/x", 2.0, 7)


@pytest.mark.parametrize(("rule", "name"), [("a.b.exact", "exact"), ("my/rules.py:score", "score")])
def test_a_reward_of_one_rule_is_one_component_called_after_it(rule: str, name: str) -> None:
    (part,) = reward_components(RewardConfig(rule=rule, kwargs={"k": 1}, timeout_s=2.0))
    assert (part.name, part.where, part.source) == (name, "reward", f"reward.rule={rule}")
    assert part.component == RewardComponent(rule=rule, kwargs={"k": 1})


RULE = {"rule": "m.f"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({"a": {}}, ("reward.components.a has none", "exactly one of rule, url, model=true")),
    "two": ({"a": {**RULE, "model": True}}, ("reward.components.a has rule and model",)),
    "no_dict": ({"a": 3}, ("reward.components.a=3 is not possible", "weight")),
    "unknown": ({"a": {**RULE, "wieght": 1}}, ("there is no setting reward.components.a.wieght", "weight")),
    "type": ({"a": {**RULE, "weight": "big"}}, ("reward.components.a.weight=big", "a number")),
    "bool": ({"a": {**RULE, "weight": True}}, ("reward.components.a.weight=True", "a number")),
    "name": ({"a/b": RULE}, ("reward.components.a/b", "letters, digits and _")),
    "normalize": ({"a": {**RULE, "normalize": "row"}}, ("normalize=row", "use none, batch")),
    "weight_nan": ({"a": {**RULE, "weight": float("nan")}}, ("weight=nan", "finite")),
    "no_weights": ({"a": {**RULE, "weight": 0.0}}, ("every reward.components.*.weight is 0",)),
    "clip": ({"a": {**RULE, "clip": [1, -1]}}, ("clip=[1.0, -1.0]", "low < high")),
    "clip_of_one": ({"a": {**RULE, "clip": [1]}}, ("clip=[1.0]", "low < high")),
    "clip_text": ({"a": {**RULE, "clip": "5"}}, ("clip=5", "list of two numbers")),
    "gate": ({"a": {**RULE, "gate": "c"}, "b": RULE}, ("a.gate=c is no other component", "use one of b")),
    "gate_itself": ({"a": {**RULE, "gate": "a"}}, ("a.gate=a is no other component", "leave gate out")),
    "gate_value": ({"a": {**RULE, "gate_value": 1.0}}, ("a.gate_above and gate_value", "without reward.components.a.gate")),
    "model": ({"a": {"model": 3}}, ("reward.components.a.model=3 is not possible", "give true or false or text")),
    "workers": ({"a": {**RULE, "workers": 0}}, ("reward.components.a.workers=0", "at least 1, or null")),
    "timeout": ({"a": {**RULE, "timeout_s": -1}}, ("reward.components.a.timeout_s=-1.0", "more than 0")),
    "kwargs": ({"a": {"model": True, "kwargs": {"x": 1}}}, ("a.kwargs are arguments of a rule", "leave them out")),
    "token": ({"a": {**RULE, "token_env": "T"}}, ("reward.components.a.judge and token_env", "set reward.components.a.url")),
    "environment": ({"a": {**RULE, "environment": True}}, ("reward.components.a has rule and environment",)),
    "environment_text": (
        {"a": {"environment": True, "keep_special_tokens": True}}, ("a.keep_special_tokens", "no text"),
    ),
    "judge": ({"a": {"url": "http://h", "judge": {"modle": "x"}}}, ("reward.components.a.judge.modle", "pattern")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_names_the_setting(name: str) -> None:
    components, said = CASES[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        reward_components(RewardConfig(components=components))
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize("settings", [{"rule": "other.rule"}, {"kwargs": {"ignore_case": True}}])
def test_one_rule_and_components_at_once_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reward\.(rule|kwargs)=.* make it a component too"):
        reward_components(RewardConfig(components={"a": RULE}, **settings))


def test_special_tokens_are_kept_where_that_is_asked_for() -> None:
    (alone,) = reward_components(RewardConfig(rule="m.f", keep_special_tokens=True))
    assert alone.keep_special_tokens
    components: dict[str, Any] = {name: {"rule": "m.f"} for name in "ab"}
    components["b"]["keep_special_tokens"] = True
    assert [part.keep_special_tokens for part in reward_components(RewardConfig(components=components))] == [
        False,
        True,
    ]
    components["b"]["keep_special_tokens"] = False
    whole = reward_components(RewardConfig(components=components, keep_special_tokens=True))
    assert [part.keep_special_tokens for part in whole] == [True, False]
    composed = shipped(
        "weighted", "reward.keep_special_tokens=true", "+reward.components.form.keep_special_tokens=false"
    )
    assert [part.keep_special_tokens for part in reward_components(composed)] == [True, False]
    with pytest.raises(ValueError, match="keep_special_tokens: the reward model reads tokens, not text; leave it out"):
        reward_components(shipped("model", "+reward.components.model.keep_special_tokens=true"))
    with pytest.raises(ValueError, match="keep_special_tokens=1 is not possible; give true or false"):
        reward_components(shipped("weighted", "+reward.components.form.keep_special_tokens=1"))
