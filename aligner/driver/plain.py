"""The configuration as files can hold it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.config import Config


def plain(config: Config) -> dict[str, Any]:
    """Nested dicts of what YAML and JSON have (no tuples, no objects)."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return values
