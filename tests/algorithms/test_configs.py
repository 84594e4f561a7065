"""Every shipped method builds its loop and its settings; a wrong value is refused before a model is built, by name."""

from __future__ import annotations

import functools
import inspect
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from hydra.utils import get_method

from aligner.check.loop_settings import hints_of, settings_of
from aligner.config.schema import compose_config, to_config
from aligner.run.prepare import BATCHES, prepare
from tests.algorithms.methods import methods

DATA = {name: "preferences" for name in ("dpo", "ipo", "ipo_paper", "robust_dpo", "orpo", "simpo", "reward_model")}
DATA |= {"sft": "demonstrations", "kto": "feedback"}


def built(method: str, *overrides: str) -> tuple[Any, Any]:
    """(loop, settings) of a method."""
    data = DATA.get(method, "prompts")
    composed = compose_config(["model.path=folder", f"algorithm={method}", f"data={data}", *overrides])
    algorithm = to_config(composed).algorithm
    loop = get_method(algorithm["_target_"])
    return loop, settings_of(loop, {name: value for name, value in algorithm.items() if name != "_target_"})


@pytest.mark.parametrize("method", methods())
def test_every_method_builds(method: str) -> None:
    loop, settings = built(method)
    assert is_dataclass(settings)
    kind = hints_of(loop)[list(inspect.signature(loop).parameters)[1]]
    assert BATCHES[DATA.get(method, "prompts")] == kind
    for name in ("loss", "value_loss", "advantages", "length_penalty"):
        function = getattr(settings, name, None)
        assert function is None or isinstance(function, functools.partial), name
    if hasattr(settings, "loss"):
        assert settings.loss is not None
    # what is compared with a reference has one, and what has none is no preference loss that names it
    names = inspect.signature(settings.loss).parameters if hasattr(settings, "loss") else {}
    if "reference_sum_B" in names:
        assert "reference" in settings.roles


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("gspo", {"policy.reduction": "sequence_mean"}),
        ("grpo_paper", {"policy.reduction": "sequence_mean"}),
        ("reinforce_pp_paper", {"policy.reduction": "sequence_mean"}),
        ("dr_grpo", {"policy.reduction": "fixed", "policy.fixed_length": 0}),
        ("rloo", {"policy.reduction": "fixed", "policy.fixed_length": 1}),
        ("rloo_paper", {"policy.reduction": "fixed", "policy.fixed_length": 1}),
        ("remax", {"policy.reduction": "fixed", "policy.fixed_length": 1}),
        ("grpo_decoupled", {"stream.lag": 1}),
        ("dapo_paper", {"policy.minibatches": 16}),
        ("ppo_paper", {"policy.minibatches": 8, "critic.minibatches": 8}),
    ],
)
def test_a_method_sets_what_else_it_needs(method: str, needs: dict[str, Any]) -> None:
    config = to_config(compose_config(["model.path=folder", f"algorithm={method}"], "quickstart"))
    assert {name: attrgetter(name)(config) for name in needs} == needs
    assert config.policy.optimizer.lr == 2e-4, "what quickstart sets beside it stays"


def test_the_command_line_wins_over_what_a_method_sets() -> None:
    given = ["algorithm=dapo_paper", "policy.minibatches=2", "policy.reduction=fixed"]
    config = to_config(compose_config(["model.path=folder", *given]))
    assert (config.policy.minibatches, config.policy.reduction) == (2, "fixed")
    config = to_config(compose_config(["model.path=folder", "algorithm=grpo_decoupled", "stream.lag=0"]))
    assert config.stream.lag == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["algorithm=dapo"], r"algorithm\.length_penalty\.max_length=32 is the limit of one turn .* such as 256, or"),
        (["algorithm=rank_samples"], "algorithm=rank_samples writes pairs of responses, and with environment.target"),
    ],
)
def test_what_does_not_suit_episodes_is_refused(given: list[str], message: str) -> None:
    episodes = ["environment.target=TicTacToe-v0", "environment.max_turns=8", "sampling.max_tokens=32"]
    with pytest.raises(ValueError, match=message):
        prepare(to_config(compose_config(["model.path=folder", *episodes, *given])), 1)


def test_a_length_penalty_of_whole_episodes_is_none_of_these() -> None:
    _, settings = built("dapo", "algorithm.length_penalty.max_length=256")
    config = to_config(
        compose_config(["model.path=folder", "environment.target=TicTacToe-v0", "sampling.max_tokens=32"])
    )
    settings.check_job(config)


def test_kto_needs_another_prompt_in_the_batch() -> None:
    given = ["model.path=folder", "algorithm=kto", "data=feedback", "data.prompts_per_step=1"]
    with pytest.raises(ValueError, match=r"data\.prompts_per_step=1: .* use 2 or more"):
        prepare(to_config(compose_config(given)), 1)


def test_dapo_s_overlong_punishment_takes_the_limit_of_sampling() -> None:
    _, settings = built("dapo", "sampling.max_tokens=10", "algorithm.length_penalty.buffer=4")
    # Yu et al. 2025, equation 13: 0 up to 10 - 4 tokens, then down to -1 at 10
    assert settings.length_penalty(torch.tensor([5, 6, 8, 10])).tolist() == [0.0, 0.0, -0.5, -1.0]


@pytest.mark.parametrize(
    ("method", "override", "said"),
    [
        ("grpo", "algorithm.advantages.normalize=mean", "algorithm.advantages: normalize='mean' is unknown"),
        ("grpo", "+algorithm.advantages.colour=1", "algorithm.advantages.colour: .* has no such argument"),
        ("grpo", "algorithm.advantages=null", "algorithm.advantages needs a _target_"),
        ("grpo", "+algorithm.more_batches=-1", "algorithm.more_batches=-1 must be at least 0"),
        ("grpo", "algorithm.group_size=1", "algorithm.group_size=1 must be at least 2 .a single sample has nothing"),
        ("grpo", "+algorithm.reward_kl_coef=0.1 algorithm.roles=[policy,rollout,reward]", "algorithm.reward_kl_coef=0.1 needs the reference"),
        ("grpo", "algorithm.loss.clip_low=2", r"algorithm.loss: clip_low=2 must lie in \[0, 1\]"),
        ("grpo", "algorithm.loss.clip_high=-1", "algorithm.loss: clip_high=-1 must be 0 or more"),
        ("grpo", "algorithm.loss.dual_clip=1", "algorithm.loss: dual_clip=1 must be more than 1"),
        ("grpo", "algorithm.loss.kl=k9", "algorithm.loss: .*k9"),
        ("grpo", "algorithm.loss.kl=k1 algorithm.loss.kl_coef=0.1", "algorithm.loss: kl=k1"),
        ("grpo", "algorithm.loss.kl_coef=0.1 algorithm.roles=[policy,rollout,reward]", "kl_coef=0.1 needs"),
        ("grpo", "+algorithm.loss.clip_lo=1", "algorithm.loss.clip_lo: .* has no such argument; it has"),
        ("grpo", "+algorithm.clip=1", "Key 'clip' not in 'GrpoConfig'.*settings of grpo: roles, group_size, advantages"),
        ("dapo", "algorithm.length_penalty.buffer=-1", "algorithm.length_penalty.*buffer=-1 must lie in"),
        ("gspo", "algorithm.loss.clip_low=-1", "algorithm.loss: clip_low=-1"),
        ("rloo", "+algorithm.loss.kl=k1 +algorithm.loss.kl_coef=1", "algorithm.loss: kl=k1"),
        ("grpo_turns", "algorithm.advantages.compare=all", "algorithm.advantages: compare='all' is unknown; use one of turn, group"),
        ("grpo_turns", "algorithm.advantages.gamma=2", "algorithm.advantages: gamma=2 must lie in"),
        ("ppo_turns", "algorithm.advantages.baseline=mean", "algorithm.advantages: baseline='mean' is unknown; use one of turn, token"),
        ("ppo", "algorithm.advantages=null", "algorithm.advantages needs a _target_; see conf/algorithm/ppo.yaml"),
        ("ppo", "algorithm.kl_control=null", "algorithm.kl_control needs a _target_"),
        ("ppo", "algorithm.kl_control.initial=-1", "algorithm.kl_control.*kl_control.initial=-1 must be 0 or more"),
        ("ppo", "algorithm.gamma=1.5", "algorithm.gamma=1.5 must be between 0 and 1"),
        ("ppo", "algorithm.lam=-0.1", "algorithm.lam=-0.1 must be between 0 and 1"),
        ("ppo", "algorithm.critic_warmup=-1", "algorithm.critic_warmup=-1 must be at least 0"),
        ("ppo", "algorithm.reward_clip=0", "algorithm.reward_clip=0.0 must be more than 0"),
        ("ppo", "algorithm.value_loss=null", "algorithm.value_loss has no value; give algorithm.value_loss._target_"),
        ("ppo", "algorithm.value_loss.clip=0", "algorithm.value_loss: clip=0 must be more than 0"),
        ("dpo", "algorithm.loss.beta=-1", "algorithm.loss: beta=-1 must be more than 0"),
        ("dpo", "algorithm.loss.label_smoothing=1", "algorithm.loss: label_smoothing=1 must be"),
        ("dpo", "+algorithm.loss.log_ratio=mean", "algorithm.loss: log_ratio='mean' is unknown"),
        ("dpo", "algorithm.loss._target_=aligner.objective.preference.dpoo", "algorithm.loss._target_=.*dpoo cannot be built"),
        ("dpo", "algorithm.roles=[policy]", "algorithm.loss compares with the reference; add reference to algorithm.roles"),
        ("ipo", "algorithm.loss.beta=0", "algorithm.loss: beta=0"),
        ("robust_dpo", "algorithm.loss.label_smoothing=0.5", "algorithm.loss: label_smoothing=0.5"),
        ("orpo", "algorithm.loss.beta=-1", "algorithm.loss: beta=-1"),
        ("simpo", "algorithm.loss.beta=0", "algorithm.loss: beta=0"),
        ("kto", "algorithm.loss.desirable_weight=-1", "algorithm.loss: desirable_weight=-1"),
        ("online_dpo", "algorithm.loss.beta=-1", "algorithm.loss: beta=-1"),
        ("online_dpo", "algorithm.more_batches=-1", "algorithm.more_batches=-1"),
        ("reward_model", "algorithm.loss.centre_coef=-1", "algorithm.loss: centre_coef=-1 must be 0 or more"),
        ("reward_model", "algorithm.margin=much", "algorithm: .*much"),
        ("reinforce_pp", "algorithm.reward_clip=0", "algorithm.reward_clip=0"),
        ("reinforce_pp", "algorithm.group_size=0", "algorithm.group_size=0"),
        ("reinforce_pp", "algorithm.gamma=2", "algorithm.gamma=2"),
        ("remax", "algorithm.group_size=0", "algorithm.group_size=0"),
        ("remax", "algorithm.loss=null", "algorithm.loss has no value; give algorithm.loss._target_"),
        ("remax", "algorithm.reward_kl_coef=0.1 algorithm.roles=[policy,rollout,reward]", "algorithm.reward_kl_coef=0.1 needs the reference"),
        ("sft", "algorithm.loss=null", "algorithm.loss has no value; give algorithm.loss._target_"),
        ("rank_samples", "algorithm.group_size=1", "algorithm.group_size=1 must be at least 2"),
        ("rank_samples", "algorithm.out=/nowhere/preferences.jsonl", "algorithm.out=/nowhere/preferences.jsonl"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(method: str, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built(method, *override.split())
