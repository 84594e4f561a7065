"""Held-out accuracy: the mean reward of one response to each held-out prompt, with the same seeds every time."""

from __future__ import annotations

from dataclasses import replace

import torch

from aligner.config import Config
from aligner.data.prompts import Prompt
from aligner.roles import Roles


def evaluate(roles: Roles, prompts: list[Prompt], config: Config) -> float:
    """Mean reward over the prompts whose response has one; NaN if none has. A collective of the whole world."""
    sampling = replace(config.sampling, temperature=config.train.eval_temperature)
    samples = roles.rollout.generate(prompts, sampling=sampling, seed=config.seed)
    reward_B: torch.Tensor = roles.reward.score(samples)["reward_B"].get()
    scored_B = reward_B[~torch.isnan(reward_B)]
    return scored_B.mean().item() if len(scored_B) else float("nan")
