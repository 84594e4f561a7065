"""The training loops; start reading here. Each is a generator that every rank runs in lockstep (SPMD).

In: the roles, a stream of batches, the algorithm's settings. Out: one `Step` per iteration, which `run/` logs.
To add a loop, write a function with the same three arguments and set `algorithm._target_=my_file.my_loop`.
"""

from aligner.algorithms.step import Step

__all__ = ["Step"]
