"""PPO for language models (Ouyang et al. 2022): a critic with GAE over tokens or turns, KL penalty in the token reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from aligner.algorithms.advantages import critic_estimates, two_turns
from aligner.algorithms.off_policy import proximal_logprobs
from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.algorithms.whitening import whiten_batch
from aligner.bounds import AtLeast, Between, MoreThan
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.kl import k1
from aligner.objective.masked import apply_mask, row_sums
from aligner.objective.moments import Moments
from aligner.objective.shaping import running_scale
from aligner.objective.token_rewards import kl_rewards
from aligner.roles.build import Roles


@dataclass(frozen=True)
class PpoConfig:
    """Settings of `ppo`; epochs and minibatches are policy.epochs, policy.minibatches, critic.epochs, critic.minibatches."""

    roles: list[str] = field(default_factory=lambda: ["policy", "critic", "rollout", "reference", "reward"])
    """Roles to build; without the reference there is no KL penalty."""
    group_size: Annotated[int, AtLeast(1)] = 1
    """Samples per prompt."""
    advantages: Any = None
    """Function (reward_BT, value_BT, mask_BT, gamma, lam) -> (advantage_BT, return_BT), as a `_target_` with `_partial_: true`: gae,
    whose time steps are tokens, or turn_gae of aligner.objective.turns, which takes turn_BT too."""
    gamma: Annotated[float, Between(0, 1)] = 1.0
    """Discount factor per time step of `advantages`: per token with gae, per turn with turn_gae."""
    lam: Annotated[float, Between(0, 1)] = 0.95
    """GAE's lambda: 1 is the Monte Carlo return, 0 the one-step TD error."""
    kl_control: Any = None
    """KL coefficient: FixedKL or AdaptiveKL of aligner.objective.kl_control, as a `_target_`."""
    scale_rewards: bool = False
    """Divide rewards by the running standard deviation of all rewards so far."""
    reward_clip: Annotated[float, MoreThan(0)] = math.inf
    """Clip the (scaled) reward to [-reward_clip, reward_clip]."""
    whiten: bool = True
    """Whiten advantages over all trained tokens of the global batch; false: use them as GAE returns them (Schulman et al.
    2017)."""
    critic_warmup: Annotated[int, AtLeast(0)] = 0
    """Number of first steps in which only the critic is updated."""
    loss: Any = None
    """Policy loss with its arguments, as a `_target_` with `_partial_: true`."""
    value_loss: Any = None
    """Critic loss with its arguments, as a `_target_` with `_partial_: true`."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.kl_control is None:
            raise ValueError("algorithm.kl_control needs a _target_; see conf/algorithm/ppo.yaml.")
        if self.advantages is None:
            raise ValueError("algorithm.advantages needs a _target_; see conf/algorithm/ppo.yaml and ppo_turns.yaml.")
        try:
            nothing_BT = torch.zeros(1, 4)
            critic_estimates(self.advantages, nothing_BT, nothing_BT, two_turns(1), self.gamma, self.lam)
        except ValueError as error:
            raise ValueError(f"algorithm.advantages: {error}") from None


@dataclass(frozen=True)
class Estimates:
    """GAE advantages and the critic's regression targets, [B, T] each."""

    advantage_BT: Tensor
    return_BT: Tensor


def ppo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: PpoConfig) -> Iterator[Step]:
    """`epochs` x `minibatches` optimizer steps of the critic and of the policy for each batch of prompts."""
    policy, critic, rollout, reference = roles.policy, roles.critic, roles.rollout, roles.reference
    state = roles.keep(kl_coef=cfg.kl_control.initial, rewards=Moments(), scale=1.0, steps=0)
    policy.reshard_to(rollout)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        samples, scores = batch.samples, batch.scores
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        reference_logp_BT = reference.logprobs(samples) if reference else None
        value_BT = critic.values(trained)
        if cfg.scale_rewards:
            state.rewards, state.scale = running_scale(state.rewards, scores["reward_B"].gather())
        reward_BT = policy.map(
            token_rewards, trained, scores["reward_B"], reference_logp_BT, state.kl_coef, state.scale, cfg.reward_clip
        )
        estimates = policy.map(estimate, cfg.advantages, reward_BT, value_BT, trained, cfg.gamma, cfg.lam)
        advantage_BT = estimates["advantage_BT"]
        if cfg.whiten:
            advantage_BT = whiten_batch(policy, advantage_BT, trained)
        extra_metrics = {
            "critic": critic.update(
                cfg.value_loss, trained, rollout_value_BT=value_BT, return_BT=estimates["return_BT"]
            ),
            "kl_coef": state.kl_coef,
        }
        metrics = None
        state.steps += 1
        if state.steps > cfg.critic_warmup:
            loss_inputs = {"advantage_BT": advantage_BT, "reference_logp_BT": reference_logp_BT}
            metrics = policy.update(cfg.loss, trained, **loss_inputs, **proximal_logprobs(policy, cfg.loss, trained))
            policy.reshard_to(rollout)
        if reference:
            kl = nan_mean(policy.map(response_kl, trained, reference_logp_BT).gather())
            state.kl_coef = cfg.kl_control.update(state.kl_coef, kl) if not math.isnan(kl) else state.kl_coef
            extra_metrics["response_kl"] = kl
        yield Step(metrics, samples, scores, extra_metrics)


def token_rewards(
    samples: Samples,
    reward_B: Tensor,
    reference_logp_BT: Tensor | None,
    kl_coef: float,
    scale: float,
    clip: float,
) -> Tensor:
    """[B, T] token rewards: -kl_coef times each token's KL, plus the scaled and clipped rewards: of turns where they end, the rest
    on the last token."""
    assert samples.rollout_logp_BT is not None
    return kl_rewards(
        reward_B,
        mask_BT=samples.mask_BT,
        policy_logp_BT=samples.rollout_logp_BT,
        reference_logp_BT=reference_logp_BT,
        kl_coef=kl_coef if reference_logp_BT is not None else 0.0,
        reward_scale=scale,
        reward_clip=clip,
        turn_reward_BT=samples.turn_reward_BT,
    )


def estimate(
    advantages: Callable[..., tuple[Tensor, Tensor]],
    reward_BT: Tensor,
    value_BT: Tensor,
    samples: Samples,
    gamma: float,
    lam: float,
) -> Estimates:
    """GAE over the trained tokens, or over turns; gamma and lam are discounts per time step of `advantages`."""
    return Estimates(*critic_estimates(advantages, reward_BT, value_BT, samples, gamma, lam))


def response_kl(samples: Samples, reference_logp_BT: Tensor) -> Tensor:
    """[B] sum of log p - log q over each row's trained tokens (k1), in nats; NaN for a row without trained tokens."""
    assert samples.rollout_logp_BT is not None
    mask_BT = samples.mask_BT
    kl_BT = k1(apply_mask(mask_BT, samples.rollout_logp_BT), apply_mask(mask_BT, reference_logp_BT))
    return torch.where(mask_BT.any(1), row_sums(kl_BT, mask_BT), torch.nan)


def nan_mean(value_B: Tensor) -> float:
    """Mean over the values that are not NaN; NaN if there are none."""
    return float(value_B.nanmean())
