"""Megatron-core as a `TrainEngine`: models, layers, attention, pipeline, optimizer, and which regions each rank holds.

In: a `ModelSpec`, a mesh, microbatches. Out: readouts, gradients, optimizer steps, weights by region. Megatron's globals and
what it needs on a CPU stay behind `cpu.py`.
"""
