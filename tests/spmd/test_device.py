"""A GPU that torch does not see is an error that says why, never a job on the CPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from aligner.spmd import device, device_check


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA build on a machine without a device, ALIGNER_DEVICE unset."""
    for module in (device, device_check):
        monkeypatch.setattr(module, "cuda_build", lambda: "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_the_installed_build_is_read_without_torch() -> None:
    assert device.cuda_build() == torch.version.cuda


@pytest.mark.parametrize(
    ("driver", "hidden", "why"),
    [
        (
            "570.86.15",
            None,
            r"the NVIDIA driver 570\.86\.15 is too old for it; install 580 or newer, or set ALIGNER_DEVICE=cpu",
        ),
        (None, None, "this machine has no NVIDIA driver"),
        ("580.65.06", None, r"the NVIDIA driver is 580\.65\.06; see what nvidia-smi"),
        ("580.65.06", "", "CUDA_VISIBLE_DEVICES is empty; unset it"),
    ],
)
def test_no_device_of_a_cuda_build(build: pytest.MonkeyPatch, driver: str | None, hidden: str | None, why: str) -> None:
    build.setattr(device_check, "driver_version", lambda: driver)
    if hidden is not None:
        build.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device.device_type() == "cuda"
    with pytest.raises(ValueError, match=why):
        device_check.check_device()


def test_the_cpus_of_a_cuda_build_are_asked_for(build: pytest.MonkeyPatch) -> None:
    build.setenv(device.VARIABLE, "cpu")
    build.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert device_check.check_device() == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "nothing else of the process takes a GPU"


def test_a_cpu_build_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, device_check):
        monkeypatch.setattr(module, "cuda_build", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(device.VARIABLE, "cuda")
    with pytest.raises(
        ValueError, match=r"ALIGNER_DEVICE=cuda, and the installed torch is a CPU build; install the other"
    ):
        device_check.check_device()
    monkeypatch.setenv(device.VARIABLE, "gpu")
    with pytest.raises(ValueError, match="ALIGNER_DEVICE=gpu is not a device; use cpu or cuda"):
        device.device_type()


def test_the_driver_of_proc(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert device.driver_version(file) is None
    for line, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Tue Mar  5 22:42:15 UTC 2024", "535.161.08"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ):
        file.write_text(f"{line}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
        assert device.driver_version(file) == version
