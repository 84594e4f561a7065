"""A loop of one's own: two reward models, of which one is a gate. What is not safe earns a penalty, however helpful it is.

    torchrun --nproc-per-node 4 -m aligner.main --config-name quickstart model.path=DIR data.path=prompts.jsonl \\
        algorithm._target_=docs.examples.two_reward_models.two_reward_models \\
        algorithm.roles=[policy,rollout,helpful,safe] placement=split placement.rollout.ranks=[1] placement.policy.ranks=[0] \\
        models.helpful='{kind: reward_model, path: HELPFUL}' placement.helpful.ranks=[2] \\
        models.safe='{kind: reward_model, path: SAFE}' placement.safe.ranks=[3]

In any loop that takes its rewards from `roles.reward`, `reward=two_models` is the same without a line of Python.
"""

import torch

from aligner.algorithms import Step
from aligner.objective.advantages import group_advantages

WEIGHT, THRESHOLD, PENALTY = 0.5, 0.0, -1.0


def gated(helpful_B, safe_B):
    """helpful where safe is above the threshold, else the penalty; plus a share of safe."""
    return torch.where(safe_B > THRESHOLD, helpful_B, PENALTY) + WEIGHT * safe_B


def two_reward_models(roles, prompts, cfg):
    policy, rollout, helpful, safe = roles.policy, roles.rollout, roles["helpful"], roles["safe"]
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.generate(batch, num_samples=cfg.group_size)
        reward_B = policy.map(gated, helpful.scores(samples), safe.scores(samples))
        advantage_B = policy.map(group_advantages, reward_B, group_size=cfg.group_size)
        metrics = policy.update(cfg.loss, samples, advantage_B=advantage_B)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, extra_metrics={"reward": float(reward_B.gather().mean())})
