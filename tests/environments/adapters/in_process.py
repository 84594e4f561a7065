"""An adapter's episodes without a process: what a worker makes of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.environments import adapters, worker

GAMES = Path(__file__).parents[1] / "games.py"
FOLDER = str(Path(adapters.__file__).parent)


def host(target: str, **settings: Any) -> worker.Host:
    """What an adapter gets for a target, `:NAME` being one of games.py."""
    usual = {"kind": "auto", "options": {}, "tools": [], "tool_options": {}, "adapters": FOLDER}
    return worker.Host({**usual, "target": f"{GAMES}{target}" if target.startswith(":") else target, **settings})
