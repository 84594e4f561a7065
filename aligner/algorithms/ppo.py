"""PPO (Ouyang et al. 2022): every token is a step; a critic says what is to be expected; KL is paid in the reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from aligner.algorithms.off_policy import proximal
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whitened
from aligner.bounds import AtLeast, Between, MoreThan
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.kl import k1
from aligner.objective.masked import inside, row_sums
from aligner.objective.moments import Moments
from aligner.objective.shaping import running_scale
from aligner.objective.token_rewards import kl_rewards
from aligner.objective.values import gae
from aligner.roles.build import Roles


@dataclass(frozen=True)
class PpoConfig:
    """PPO; epochs and minibatches are policy.epochs, policy.minibatches, critic.epochs and critic.minibatches."""

    roles: list[str] = field(default_factory=lambda: ["policy", "critic", "rollout", "reference", "reward"])
    """Roles to build; without reference there is no KL."""
    group_size: Annotated[int, AtLeast(1)] = 1
    """Samples per prompt."""
    gamma: Annotated[float, Between(0, 1)] = 1.0
    """Discount a token."""
    lam: Annotated[float, Between(0, 1)] = 0.95
    """Discount a token of GAE: 1 trusts the samples, 0 the critic."""
    kl_control: Any = None
    """Who chooses what a nat of KL costs: FixedKL or AdaptiveKL of aligner.objective.kl_control, as a `_target_`."""
    scale_rewards: bool = False
    """Divide rewards by the standard deviation of all rewards so far."""
    reward_clip: Annotated[float, MoreThan(0)] = math.inf
    """Bound on the (scaled) reward."""
    whiten: bool = True
    """Advantages less their mean, in standard deviations, over the trained tokens of the whole batch; false: as GAE gives
    them (Schulman et al. 2017)."""
    critic_warmup: Annotated[int, AtLeast(0)] = 0
    """First steps in which only the critic learns."""
    loss: Any = None
    """The policy's loss, as a `_target_` with `_partial_: true`."""
    value_loss: Any = None
    """The critic's loss, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.kl_control is None:
            raise ValueError("algorithm.kl_control needs a _target_; see conf/algorithm/ppo.yaml.")


@dataclass(frozen=True)
class Estimates:
    """What GAE makes of rewards and values."""

    advantage_BT: Tensor
    return_BT: Tensor


def ppo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: PpoConfig) -> Iterator[Step]:
    """`epochs` x `minibatches` updates of critic and policy for each batch of prompts."""
    policy, critic, rollout, reference = roles.policy, roles.critic, roles.rollout, roles.reference
    kept = roles.keep(kl_coef=cfg.kl_control.initial, rewards=Moments(), scale=1.0, steps=0)
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        samples, scores = batch.samples, batch.scores
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        reference_logp_BT = reference.logprobs(samples) if reference else None
        value_BT = critic.values(trained)
        if cfg.scale_rewards:
            kept.rewards, kept.scale = running_scale(kept.rewards, scores["reward_B"].gather())
        reward_BT = policy.map(
            token_rewards, trained, scores["reward_B"], reference_logp_BT, kept.kl_coef, kept.scale, cfg.reward_clip
        )
        estimates = policy.map(estimate, reward_BT, value_BT, trained, cfg.gamma, cfg.lam)
        advantage_BT = estimates["advantage_BT"]
        if cfg.whiten:
            advantage_BT = whitened(policy, advantage_BT, trained)
        more = {
            "critic": critic.update(
                cfg.value_loss, trained, rollout_value_BT=value_BT, return_BT=estimates["return_BT"]
            ),
            "kl_coef": kept.kl_coef,
        }
        metrics = None
        kept.steps += 1
        if kept.steps > cfg.critic_warmup:
            fields = {"advantage_BT": advantage_BT, "reference_logp_BT": reference_logp_BT}
            metrics = policy.update(cfg.loss, trained, **fields, **proximal(policy, cfg.loss, trained))
            policy.reshard_to(rollout)
        if reference:
            kl = mean_of(policy.map(response_kl, trained, reference_logp_BT).gather())
            kept.kl_coef = cfg.kl_control.update(kept.kl_coef, kl) if not math.isnan(kl) else kept.kl_coef
            more["response_kl"] = kl
        yield Step(metrics, samples, scores, more)


def token_rewards(
    samples: Samples,
    reward_B: Tensor,
    reference_logp_BT: Tensor | None,
    kl_coef: float,
    scale: float,
    clip: float,
) -> Tensor:
    """The KL of each token as its reward, and the response's reward on its last."""
    assert samples.rollout_logp_BT is not None
    return kl_rewards(
        reward_B,
        mask_BT=samples.mask_BT,
        policy_logp_BT=samples.rollout_logp_BT,
        reference_logp_BT=reference_logp_BT,
        kl_coef=kl_coef if reference_logp_BT is not None else 0.0,
        reward_scale=scale,
        reward_clip=clip,
    )


def estimate(reward_BT: Tensor, value_BT: Tensor, samples: Samples, gamma: float, lam: float) -> Estimates:
    """Advantages and returns of each trained token."""
    return Estimates(*gae(reward_BT, value_BT, samples.mask_BT, gamma=gamma, lam=lam))


def response_kl(samples: Samples, reference_logp_BT: Tensor) -> Tensor:
    """[B] the sum of log p - log q over a row's tokens, in nats; NaN for a row that is left out."""
    assert samples.rollout_logp_BT is not None
    mask_BT = samples.mask_BT
    kl_BT = k1(inside(mask_BT, samples.rollout_logp_BT), inside(mask_BT, reference_logp_BT))
    return torch.where(mask_BT.any(1), row_sums(kl_BT, mask_BT), torch.nan)


def mean_of(value_B: Tensor) -> float:
    """The mean of what is not NaN; NaN where that is nothing."""
    return float(value_B.nanmean())
