"""The mathematics between rewards and gradients: pure functions of tensors and numbers, importing only torch.

In: rewards, one a row (NaN = no reward); log-probabilities of the policy, the rollout and the reference, one a token.
Out: advantages, one a row; losses, metrics and weights, one a token. The caller multiplies, sums and reduces.

Read in the order of the work: advantages -> kl -> losses -> reduction. Shapes follow the legend in
aligner/data/samples.py: B rows, T tokens; `*_logp_BT[b, t]` is the log-probability of token t given those before it.
"""
