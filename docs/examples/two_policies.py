"""A loop of one's own: two policies learn from rewards, and from each other (deep mutual learning, Zhang et al. 2018).

Each answers the prompts with an engine of its own; the KL term of its loss is to the other one, not to a frozen reference.

    torchrun --nproc-per-node 2 -m aligner.main --config-name quickstart model.path=DIR data.path=prompts.jsonl \\
        algorithm._target_=docs.examples.two_policies.two_policies algorithm.loss.kl_coef=0.05 \\
        algorithm.roles=[policy,rollout,peer,peer_rollout,reward] \\
        models.peer='{kind: policy, path: OTHER, optimizer: {lr: 2e-4}}' models.peer_rollout='{kind: engine, path: OTHER}'
"""

from aligner.algorithms import Step
from aligner.data.samples import leave_out_unscored
from aligner.objective.advantages import group_advantages


def two_policies(roles, prompts, cfg):
    policies, rollouts = (roles.policy, roles["peer"]), (roles.rollout, roles["peer_rollout"])
    for policy, rollout in zip(policies, rollouts, strict=True):
        policy.reshard_to(rollout)
    for batch in prompts:
        drawn = [rollout.generate(batch, num_samples=cfg.group_size) for rollout in rollouts]
        scores = [roles.reward.score(samples) for samples in drawn]
        others = [other.logprobs(samples) for other, samples in zip(reversed(policies), drawn, strict=True)]
        metrics = []
        for policy, rollout, samples, scored, other in zip(policies, rollouts, drawn, scores, others, strict=True):
            advantage_B = policy.map(group_advantages, scored["reward_B"], group_size=cfg.group_size)
            trained = policy.map(leave_out_unscored, samples, scored["reward_B"])
            metrics.append(policy.update(cfg.loss, trained, advantage_B=advantage_B, reference_logp_BT=other))
            policy.reshard_to(rollout)
        yield Step(metrics[0], drawn[0], scores[0], {"peer": metrics[1]})
