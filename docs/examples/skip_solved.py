"""A loop of one's own that branches: batches that are solved already are not trained on.

The branch is taken on a value that `.gather()` has brought to every rank, so that all of them take the same one.

    torchrun --nproc-per-node 2 -m aligner.main --config-name quickstart \\
        algorithm._target_=docs.examples.skip_solved.skip_solved model.path=DIR data.path=prompts.jsonl
"""

from aligner.algorithms import Step
from aligner.data.samples import leave_out_unscored
from aligner.objective.advantages import group_advantages

SOLVED = 0.95


def skip_solved(roles, prompts, cfg):
    policy, rollout, reward = roles.policy, roles.rollout, roles.reward
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.generate(batch, num_samples=cfg.group_size)
        scores = reward.score(samples)
        if float(scores["reward_B"].gather().nanmean()) > SOLVED:
            yield Step(None, samples, scores, {"skipped": 1.0})
            continue
        advantage_B = policy.map(group_advantages, scores["reward_B"], group_size=cfg.group_size)
        trained = policy.map(leave_out_unscored, samples, scores["reward_B"])
        metrics = policy.update(cfg.loss, trained, advantage_B=advantage_B)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, {"skipped": 0.0})
