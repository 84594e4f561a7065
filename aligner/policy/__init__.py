"""Update: the policy and the frozen reference on Megatron-core.

In: `Samples` and row-wise fields (advantages, reference log-probabilities). Out: log-probabilities, new weights,
metrics; weights as regions for `reshard/`. Megatron's globals and CPU mending stay behind `cpu_megatron.py`.
"""
