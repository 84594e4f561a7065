"""Virtual environments with the packages that environments come in; never the tests' own.

ALIGNER_ENVIRONMENTS=FOLDER holds them from one run to the next; without it they are made in a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

PACKAGES = {
    "games": ("skyrl-gym==0.4.0", "reasoning-gym==0.1.25", "textarena==0.7.4", "mcp==2.3.0"),
    "openenv": ("openenv==0.10.0",),
}


@lru_cache
def interpreter(name: str) -> str:
    """The Python of a virtual environment of PACKAGES, made if it is not there."""
    folder = os.environ.get("ALIGNER_ENVIRONMENTS") or _temporary()
    python = Path(folder) / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return str(python)


@lru_cache
def _temporary() -> str:
    return tempfile.mkdtemp(prefix="environments-")
