"""torch FSDP2 as a training backend: transformers' own model class, sharded over a role's ranks.

In: a model folder, a mesh, packed microbatches. Out: a `TrainEngine`; which rank holds what, by arithmetic.
"""
