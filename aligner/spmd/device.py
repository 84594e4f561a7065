"""Which kind of device the ranks compute on: what ALIGNER_DEVICE or torch's build says (no torch)."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path

VARIABLE = "ALIGNER_DEVICE"
"""Environment variable: cpu or cuda. Unset: cuda where torch is a CUDA build."""
MIN_DRIVER = 580
"""Oldest NVIDIA driver, by its major version, that runs what torch's CUDA 13.0 build compiles."""


@cache
def cuda_build() -> str | None:
    """The CUDA version that the installed torch was built with, such as "13.0"; None: a CPU build. Does not import torch."""
    module = importlib.util.find_spec("torch")
    folders = list(module.submodule_search_locations or []) if module else []
    version = (
        re.search(r"^cuda\b.*= *'([\d.]+)'", (Path(folders[0]) / "version.py").read_text(), re.M) if folders else None
    )
    return version.group(1) if version else None


def device_type() -> str:
    """cpu or cuda, without asking a driver; a login node gives the same answer as the nodes that its jobs run on.

    Raises:
        ValueError: ALIGNER_DEVICE is neither.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "cpu", "cuda"):
        raise ValueError(f"{VARIABLE}={asked} is not a device; use cpu or cuda, or leave it unset.")
    return asked or ("cuda" if cuda_build() else "cpu")


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the loaded NVIDIA kernel driver, such as "580.65.06"; None: there is none."""
    try:
        version = re.search(r"\b(\d{3,}\.[\d.]+\d)\b", file.read_text())
    except OSError:
        return None
    return version.group(1) if version else None
