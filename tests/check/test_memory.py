"""What roles hold in memory, against sizes worked by hand from transformers' own parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.check.memory import role_bytes
from aligner.config.models import PolicySettings, RewardModelSettings
from aligner.config.schema import Config, compose_config, to_config
from aligner.models.read_spec import read_spec
from aligner.spmd.placement import make_meshes
from tests.models.tiny import save_tiny, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("qwen3-moe", tmp_path)


def _config(folder: Path, *overrides: str) -> Config:
    return to_config(compose_config([f"model.path={folder}", *overrides]))


def test_experts_and_masters_by_hand(folder: Path) -> None:
    model = tiny_model("qwen3-moe")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    dense = sum(p.numel() for p in model.parameters()) - experts
    roles = ["policy", "rollout", "reference"]
    config = _config(
        folder,
        "placement.policy.tensor=2",
        "placement.policy.expert=4",
        "policy.dtype=bfloat16",
        "reference.dtype=float32",
    )
    spec, meshes = read_spec(folder), make_meshes(config.placement, 8)
    # 4 data shards of halves, 2 of fourths of the experts: bf16 weights, fp32 gradients, masters and moments of a share
    assert role_bytes(config, "policy", roles, spec, meshes["policy"], cpu=True) == pytest.approx(
        dense / 2 * (2 + 4 + 12 / 4) + experts / 4 * (2 + 4 + 12 / 2)
    )
    assert role_bytes(config, "reference", roles, spec, meshes["reference"], cpu=True) == pytest.approx(
        4 * (dense / 2 + experts / 4)
    )
    alone = _config(folder, "policy.optimizer.distributed=false")
    meshes = make_meshes(alone.placement, 2)
    assert role_bytes(alone, "policy", roles, spec, meshes["policy"], cpu=True) == 16 * (dense + experts)


def test_the_engine_s_cache(folder: Path) -> None:
    config = _config(folder, "rollout.kv_cache_mib=3", "rollout.dtype=bfloat16", "placement.rollout.tensor=2")
    spec, mesh = read_spec(folder), make_meshes(config.placement, 2)["rollout"]
    weights = sum(p.numel() for p in tiny_model("qwen3-moe").parameters())
    assert role_bytes(config, "rollout", ["policy", "rollout"], spec, mesh, cpu=False) == weights + 3 * 2**20


def test_who_learns() -> None:
    config = Config(models={"actor": PolicySettings(path="a"), "taste": RewardModelSettings(path="b")})
    roles = ["policy", "critic", "reward_model", "actor", "taste", "reference", "rollout", "reward"]
    assert [role for role in roles if config.learns(role, roles)] == ["policy", "critic", "actor"]
    assert config.learns("reward_model", ["reward_model"]) and config.learns("taste", ["reward_model", "taste"])
