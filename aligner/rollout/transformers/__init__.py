"""The transformers library's own model as a rollout engine: batches in lockstep with a KV cache, one replica on each rank.

Read in this order: engine -> requests -> decoding (one batch) -> sampler -> weights.
"""
