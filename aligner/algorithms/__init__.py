"""The loops: read these first. Each is a generator that every rank runs in lockstep.

In: roles, a stream of batches, the algorithm's own settings. Out: one `Step` per iteration, for `driver/` to log.
A loop of one's own is a function with the same three arguments: `algorithm._target_=my_file.my_loop`.
"""

from aligner.algorithms.step import Step

__all__ = ["Step"]
