"""That torch can use the device that the ranks are to compute on: never silently another."""

from __future__ import annotations

import os

import torch

from aligner.spmd.device import MIN_DRIVER, VARIABLE, cuda_build, device_type, driver_version


def check_device() -> str:
    """`device_type`, once it is certain that torch can use it: a GPU that torch does not see must not become a job on CPUs.

    With ALIGNER_DEVICE=cpu the GPUs are hidden from this process.

    Raises:
        ValueError: cuda, and torch sees no device.
    """
    kind = device_type()
    if kind == "cpu":
        if cuda_build():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch asks the driver, which it does once
        return kind
    if not torch.cuda.is_available():
        raise ValueError(_unseen(torch.version.cuda))
    return kind


def _unseen(built_with: str | None) -> str:
    """Why no device is seen, as far as it can be known, and what would work."""
    if built_with is None:
        return (
            f"{VARIABLE}=cuda, and the installed torch is a CPU build; install the other with "
            f"{VARIABLE}=cuda ALIGNER_REINSTALL=1 bash launch/environment.sh, or set {VARIABLE}=cpu."
        )
    driver, hidden = driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip():
        reason = "CUDA_VISIBLE_DEVICES is empty; unset it"
    elif driver is None:
        reason = "this machine has no NVIDIA driver; run the job where nvidia-smi lists GPUs"
    elif int(driver.split(".")[0]) < MIN_DRIVER:
        reason = f"the NVIDIA driver {driver} is too old for it; install {MIN_DRIVER} or newer"
    else:
        reason = (
            f"the NVIDIA driver is {driver}; see what nvidia-smi and python -c 'import torch; torch.cuda.init()' say"
        )
    return f"torch (built for CUDA {built_with}) sees no GPU: {reason}, or set {VARIABLE}=cpu to compute on the CPUs."
