"""The configuration as files may hold it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.run.job import Job


def config_as_json(job: Job) -> dict[str, Any]:
    """Nested dicts of what YAML and JSON have (no tuples, no objects), without secrets."""
    values: dict[str, Any] = job.mask.plain(json.loads(json.dumps(asdict(job.config), default=str)))
    return values
