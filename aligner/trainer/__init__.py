"""Update: every model on Megatron-core: the policy, the frozen reference, the critic, the reward model.

In: `Samples` and row-wise fields (advantages, reference log-probabilities). Out: log-probabilities, values, scores; new
weights, metrics; weights as regions for `reshard/`. Megatron's globals and CPU mending stay behind `megatron/cpu.py`.
"""
