"""The small task of whole jobs, for the loops' own tests."""

import warnings
from typing import Any

from tests.e2e.conftest import Task, task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron says of itself when it is first imported
    import aligner.roles.build  # noqa: F401

__all__ = ["Task", "alike", "task"]


def alike(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What every rank has found; all must have found the same."""
    assert all(other == results[0] for other in results), "the ranks disagree"
    return results[0]
