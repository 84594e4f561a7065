"""Megatron-core as a `TrainEngine`: models, layers, attention, pipeline, optimizer, weight layout.

In: a `ModelSpec`, a mesh, microbatches. Out: readouts, gradients, optimizer steps, weights by region. All changes to Megatron's
global state are in `cpu.py` and `groups.py`.
"""
