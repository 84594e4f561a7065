"""GPUs have defaults of their own, which a value that is given replaces; those of CPUs are the dataclasses'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aligner.config.device_defaults import DEFAULTS
from aligner.config.help import help_text
from aligner.config.schema import CONF, Config, compose_config, to_config

NEEDED = ["model.path=folder"]


def composed(*overrides: str, name: str = "train", folder: Path = CONF) -> Config:
    return to_config(compose_config([*NEEDED, *overrides], name, folder))


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "rlhf"))
def test_defaults_by_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = composed(name=name)
    monkeypatch.setenv("ALIGNER_DEVICE", "cuda")
    on_gpu = composed(name=name)
    for section, values in DEFAULTS["cuda"].items():
        for key, value in values.items():
            assert getattr(getattr(on_gpu, section), key) == value
            assert getattr(getattr(on_cpu, section), key) == getattr(getattr(Config(), section), key)
    assert on_gpu.settings("reference").dtype == "bfloat16"


def test_what_is_given_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNER_DEVICE", "cuda")
    config = composed("policy.dtype=float32", "policy.recompute=none", "reshard.bucket_mib=8")
    assert (config.policy.dtype, config.policy.recompute, config.reshard.bucket_mib) == ("float32", "none", 8.0)
    assert config.rollout.dtype == "bfloat16"
    (tmp_path / "mine.yaml").write_text("defaults: [schema, _self_]\nmodel: {path: m}\npolicy: {dtype: float32}\n")
    mine = to_config(compose_config([], "mine", tmp_path))  # a folder of the user's own has the same defaults
    assert (mine.policy.dtype, mine.critic.dtype, mine.rollout.dtype) == ("float32", "bfloat16", "bfloat16")


def test_further_models_have_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [
        "models.judge={kind: engine, path: a}",
        "models.scorer={kind: reward_model, path: b, recompute: none}",
        "models.teacher={kind: frozen, path: c}",
    ]
    assert composed(*models).models["judge"].dtype == "float32"
    monkeypatch.setenv("ALIGNER_DEVICE", "cuda")
    config = composed(*models)
    assert (config.models["judge"].dtype, config.models["scorer"].dtype) == ("bfloat16", "bfloat16")
    assert config.models["scorer"].recompute == "none"
    assert config.models["teacher"].dtype is None and config.settings("teacher").dtype == "bfloat16"


def test_a_check_for_gpus_has_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_DEVICE", "cpu")
    assert composed("mode=check").policy.dtype == "float32"
    assert composed("mode=check", "check.device_gib=80").policy.dtype == "bfloat16"
    assert composed("check.device_gib=80").policy.dtype == "float32", (
        "it says nothing about the machine of a training run"
    )


def test_help_tells_both() -> None:
    text = help_text()
    assert "  policy.dtype=float32 (on GPUs bfloat16)  [one of float32, bfloat16]" in text
    assert "  policy.recompute=none (on GPUs full)" in text
    assert "  reshard.bucket_mib=32.0 (on GPUs 256.0)" in text
    noted = re.findall(r"^  [\w.]+=\S+ \(on GPUs \S+\)", text, re.MULTILINE)
    assert len(noted) == sum(map(len, DEFAULTS["cuda"].values()))
