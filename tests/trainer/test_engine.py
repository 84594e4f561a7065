"""The seam of training backends: a second, plain one gives the same updates through the same roles; and the table of backends."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from aligner.bounds import check_settings
from aligner.config.schema import Config, compose_config, to_config
from aligner.trainer import engines
from aligner.trainer.config import PolicyConfig, ReferenceConfig
from aligner.trainer.engine import TrainEngine
from tests.conftest import Ranks
from tests.models.tiny import save_small_weights

MODELS = ("llama", "qwen2-tied")
CASES = ("sft", "grpo", "critic", "reward_model")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, by name."""
    return save_small_weights(tmp_path_factory.mktemp("models"), MODELS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_another_backend_gives_the_same(ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str) -> None:
    """Readouts, metrics, gradients, weights; and Megatron goes on from what the other backend saved."""
    (worst,) = ranks(1).run("tests.trainer.engines_on_ranks:compare", models / model, case, tmp_path)
    assert len(worst) == 6 and max(worst.values()) < 1e-5, worst


@pytest.mark.filterwarnings("ignore")  # Megatron-core's own, of apex and TransformerEngine
def test_the_table_knows_every_backend() -> None:
    for name, backend in engines.BACKENDS.items():
        kind = backend.engine_type()
        assert issubclass(kind, TrainEngine) and not inspect.isabstract(kind), name
    with pytest.raises(ValueError, match=r"engine=deepspeed is unknown; use megatron, fsdp\."):
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
