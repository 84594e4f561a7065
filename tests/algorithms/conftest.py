"""The small task of whole jobs, for the loops' own tests."""

import warnings

from tests.e2e.conftest import Task, task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron says of itself when it is first imported
    import aligner.roles  # noqa: F401

__all__ = ["Task", "task"]
