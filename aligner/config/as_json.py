"""The configuration as files may hold it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from aligner.config.schema import Config
from aligner.config.secrets import Mask


def config_as_json(config: Config, mask: Mask) -> dict[str, Any]:
    """Nested dicts of what YAML and JSON have (no tuples, no objects), without the secrets that `mask` knows."""
    values: dict[str, Any] = mask.plain(json.loads(json.dumps(asdict(config), default=str)))
    return values
