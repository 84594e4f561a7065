"""The seam of training backends: a second, plain one gives the same updates through the same roles; and the table of backends."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest
import torch

from aligner.bounds import check_settings
from aligner.config.schema import Config, compose_config, to_config
from aligner.trainer import engines
from aligner.trainer.config import PolicyConfig, ReferenceConfig
from aligner.trainer.engine import TrainEngine
from tests.models.tiny import tiny_model
from tests.torchrun import launch

ROOT = Path(__file__).resolve().parents[2]

MODELS = ("llama", "qwen2-tied")
CASES = ("sft", "grpo", "critic", "reward_model")
QUANTITIES = ("readout", "metrics", "gradients", "weights", "taken over", "taken over, weights")


@pytest.fixture(scope="module")
def worst(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The largest differences between the backends, by case and quantity."""
    folder, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for name in MODELS:
        model = tiny_model(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.mul_(0.1).add_(float("norm" in key))
        model.save_pretrained(folder / name)
    program = [str(Path(__file__).with_name("two_engines.py")), str(folder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = launch(1, program, cwd=out, env=environment, seconds=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "worst.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("case", [f"{model}-{case}" for model in MODELS for case in CASES])
def test_another_backend_gives_the_same(worst: dict[str, dict[str, float]], case: str, quantity: str) -> None:
    """Three updates of two optimizer steps and more; then Megatron goes on from what the plain backend saved."""
    assert worst[case][quantity] < 1e-5


@pytest.mark.filterwarnings("ignore")  # Megatron-core's own, of apex and TransformerEngine
def test_the_table_knows_every_backend() -> None:
    for name, backend in engines.BACKENDS.items():
        kind = backend.engine_type()
        assert issubclass(kind, TrainEngine) and not inspect.isabstract(kind), name
    with pytest.raises(ValueError, match=r"engine=deepspeed is unknown; use megatron\."):
        engines.backend("deepspeed")


def composed(folder: Path, *overrides: str) -> Config:
    return to_config(compose_config([f"run_dir={folder}", f"model.path={folder}", *overrides], "train"))


def test_the_setting_is_of_every_role_with_a_model(tmp_path: Path) -> None:
    usual = composed(tmp_path)
    assert {section.engine for section in (usual.policy, usual.critic, usual.reward_model)} == {"megatron"}
    other = composed(tmp_path, "policy.engine=other")
    assert other.reference.over(other.policy).engine == "other", "null: the policy's"
    own = composed(tmp_path, "policy.engine=other", "reference.engine=megatron", "critic.engine=third")
    assert own.reference.over(own.policy).engine == "megatron" and own.critic.engine == "third"


@pytest.mark.parametrize("settings", [PolicyConfig(engine="deepspeed"), ReferenceConfig(engine="deepspeed")])
def test_an_unknown_backend_is_refused_with_those_that_there_are(settings: PolicyConfig | ReferenceConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.engine=deepspeed is unknown; use megatron"):
        check_settings(settings, "model")
