"""A loop of one's own: rejection sampling. Keep each prompt's best response, if it scored, and imitate it.

    torchrun --nproc-per-node 2 -m aligner.main --config-name quickstart \\
        algorithm._target_=docs.examples.best_of_n.best_of_n model.path=DIR data.path=prompts.jsonl
"""

from functools import partial

from aligner.algorithms import Step
from aligner.objective.losses import clipped_surrogate


def best_of_group(reward_B, group_size):
    """1 for the first best response of each group, 0 for the others (and where nothing scored)."""
    reward_PG = reward_B.nan_to_num(-1e9).view(-1, group_size)
    best_PG = reward_PG.argmax(1, keepdim=True) == reward_PG.new_tensor(range(group_size))
    return (best_PG & (reward_PG > 0)).float().flatten()


def best_of_n(roles, prompts, cfg):
    loss = partial(clipped_surrogate, clip_low=1.0, clip_high=float("inf"))  # gradient: weight x log-likelihood
    roles.policy.reshard_to(roles.rollout)
    for batch in prompts:
        samples = roles.rollout.generate(batch, num_samples=cfg.group_size)
        scores = roles.reward.score(samples)
        weight_B = roles.policy.map(best_of_group, scores["reward_B"], group_size=cfg.group_size)
        metrics = roles.policy.update(loss, samples, advantage_B=weight_B)
        roles.policy.reshard_to(roles.rollout)
        yield Step(metrics, samples, scores)
