"""The logging settings name the setting and the values that would work."""

import subprocess
import sys

import pytest

from aligner.bounds import check_settings
from aligner.report.config import LoggingConfig, WandbConfig


def test_defaults_are_valid_and_wandb_is_off() -> None:
    check_settings(LoggingConfig(), "logging")
    assert LoggingConfig().wandb_run() is None


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_wandb_run_carries_mode_project_and_name(mode: str) -> None:
    config = LoggingConfig(wandb=mode, project="p", name="n")
    check_settings(config, "logging")
    assert config.wandb_run() == WandbConfig(mode=mode, project="p", name="n")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoggingConfig(wandb="onlin"), r"logging\.wandb=onlin is unknown; use off, offline, online\."),
        (LoggingConfig(wandb="False"), r'logging\.wandb.*quote it: wandb: "off"'),
        (LoggingConfig(project=""), r"logging\.project has no value; give one, such as logging\.project=aligner"),
        (LoggingConfig(samples_every=-1), r"logging\.samples_every=-1 must be at least 0 \(0: none\)"),
        (LoggingConfig(samples_count=0), r"logging\.samples_count=0 must be at least 1"),
    ],
)
def test_a_bad_setting_is_named(config: LoggingConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(config, "logging")


def test_neither_settings_nor_writer_nor_report_import_what_is_heavy() -> None:
    heavy = "{'torch', 'vllm', 'megatron', 'matplotlib', 'wandb', 'transformers'}"
    code = (
        "import sys, aligner.report.config, aligner.report.metrics, aligner.report.write, aligner.report.samples\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
