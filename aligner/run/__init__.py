"""One job around its loop: what is not the algorithm.

In: a checked configuration. Out: a run folder: checkpoints, Hugging Face exports, metrics; and a clean end.
"""
