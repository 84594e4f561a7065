"""The small task of whole jobs, for the loops' own tests."""

import json
import re
import warnings
from typing import Any

from tests.e2e.conftest import Task, task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron says of itself when it is first imported
    import aligner.roles.build  # noqa: F401

__all__ = ["Task", "said_alike", "task"]


def said_alike(stdout: str, ranks: int) -> dict[str, Any]:
    """What every rank has said, as JSON by what it is about ("said RANK WHAT: JSON"); all must have said the same."""
    found: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for rank, what, value in re.findall(r"said (\d+) ([^:]+): (.*)", stdout):
        found[int(rank)][what] = json.loads(value)
    assert all(other == found[0] for other in found), "the ranks disagree"
    return found[0]
