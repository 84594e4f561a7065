"""Training checkpoints: asynchronous, atomic, checksummed, loadable under any parallel layout.

In: tensors as regions, and JSON values, from the roles, the loop and the run. Out: one folder per step, and its contents
back.
"""
