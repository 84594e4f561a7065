"""Advantages and losses: pure functions of tensors and numbers that import only torch.

In: rewards per row (NaN: no reward); log-probabilities of the policy, the rollout and the reference per token; values
per token; preferences per row.
Out: advantages per row or token; unreduced losses and metrics per token or row; weights with which the caller reduces
them.

In the order of the data flow:
    shaping -> token_rewards -> advantages, values -> moments       rewards to advantages
    token_rewards, advantages -> turns                              the same for the turns of episodes
    kl -> losses -> reduction                                       advantages to the scalar loss
    pairs -> preference, reward_model                               preferences to the scalar loss
    kl_control                                                      the KL coefficient between batches
    masked                                                          masking, row sums and shape checks shared by all
Shapes follow the legend in aligner/data/samples.py: B rows, T tokens; `*_logp_BT[b, t]` is the log-probability of token
t given those before it, `value_BT[b, t]` the value of the text before token t.
"""
