"""The mathematics between rewards and gradients: pure functions of tensors and numbers, importing only torch.

In: rewards, one a row (NaN = no reward); log-probabilities of the policy, the rollout and the reference, one a token;
values, one a token; preferences, one a row.
Out: advantages, one a row or a token; losses, metrics and weights, one a token or a row. The caller multiplies, sums
and reduces.

Read in the order of the work:
    shaping -> token_rewards -> advantages, values -> moments       from rewards to advantages
    kl -> losses -> reduction                                       from advantages to what is minimised
    pairs -> preference, reward_model                               from preferences to what is minimised
    kl_control                                                      what one batch tells the next
    masked                                                          what all of them share
Shapes follow the legend in aligner/data/samples.py: B rows, T tokens; `*_logp_BT[b, t]` is the log-probability of token
t given those before it, `value_BT[b, t]` the value of the text before token t.
"""
