"""Training: models on a training backend, as roles: policy, frozen reference, critic, reward model.

In: `Samples` and row-wise fields (advantages, reference log-probabilities). Out: log-probabilities, values, scores; optimizer
steps and their metrics; weights as regions of checkpoint tensors. Roles, the update, packing, losses and checkpoints use only `engine.TrainEngine`; `megatron/` and `fsdp/` implement it, and `engines.py` is the table of backends.
"""
