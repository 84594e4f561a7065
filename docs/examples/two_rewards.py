"""A loop of one's own: two rewards, each compared within its group by itself, so that neither drowns the other.

    torchrun --nproc-per-node 2 -m aligner.main --config-name quickstart reward=weighted \\
        algorithm._target_=docs.examples.two_rewards.two_rewards model.path=DIR data.path=prompts.jsonl
"""

from aligner.algorithms import Step
from aligner.data.samples import leave_out_unscored
from aligner.objective.advantages import group_advantages


def summed_advantages(components, reward_B, group_size):
    """The sum of each component's group advantage; a row that lacks one has no reward at all, and no advantage."""
    missing_B = reward_B.isnan()
    parts = [value_B.masked_fill(missing_B, float("nan")) for value_B in components.values()]
    return sum(group_advantages(part_B, group_size=group_size) for part_B in parts)


def two_rewards(roles, prompts, cfg):
    policy, rollout = roles.policy, roles.rollout
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.generate(batch, num_samples=cfg.group_size)
        scores = roles.reward.score(samples)
        advantage_B = policy.map(summed_advantages, scores["components"], scores["reward_B"], group_size=cfg.group_size)
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        metrics = policy.update(cfg.loss, trained, advantage_B=advantage_B)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores)
