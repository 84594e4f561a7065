"""What is wrong with a critic or a reward model is said before a model is built, naming setting and remedy."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aligner.bounds import check_settings
from aligner.config.schema import Config, compose_config, to_config
from aligner.data.column_addition import ModelShape, write_model
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.models.tensors import parameter_count
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import RoleLayout, make_meshes, role_layout, usual_placement
from aligner.spmd.role_table import USUAL
from aligner.trainer.config import CriticConfig, RewardModelConfig
from tests.check.whole import check

SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a file of demonstrations."""
    folder = tmp_path_factory.mktemp("heads")
    write_model(folder / "model", SHAPE, seed=0)
    rows = [{"prompt": "<bos>1+2=", "completion": "3"}] * 4
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, *overrides: str) -> Config:
    settings = (f"model.path={folder}/model", f"run_dir={folder}/run", f"data.path={folder}/rows.jsonl")
    return to_config(
        compose_config(["algorithm=sft", "data=demonstrations", "data.prompts_per_step=2", *settings, *overrides])
    )


def refused(config: Config, roles: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(config, roles, world_size=2)


def test_both_heads_on_the_model_itself_pass(folder: Path) -> None:
    found = check(config(folder), ["policy", "critic", "reward_model"], world_size=2)
    assert found.meshes["critic"].ranks == found.meshes["reward_model"].ranks == (0, 1)
    check(config(folder), ["reward_model"], world_size=2)


def test_defaults_and_overrides(folder: Path) -> None:
    found = config(folder, "critic.path=a", "critic.optimizer.lr=1e-5", "reward_model.micro_tokens=7")
    assert found.critic.path == "a" and found.critic.optimizer.lr == 1e-5
    assert found.reward_model == RewardModelConfig(micro_tokens=7)
    assert config(folder).critic == CriticConfig()
    shared = config(folder, "policy.share_prefix=off", "critic.share_prefix=on")
    assert (shared.policy.share_prefix, shared.critic.share_prefix, shared.reward_model.share_prefix) == (
        "off",
        "on",
        "auto",
    )
    assert found.model_path("critic") == ("critic.path", "a")
    assert found.model_path("reward_model") == ("model.path", f"{folder}/model")


@pytest.mark.parametrize("section", ["policy", "critic", "reward_model"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dtype=float8", r"dtype=float8 is unknown; use float32, bfloat16"),
        ("optimizer.schedule=step", r"optimizer\.schedule=step is unknown; use constant, linear, cosine"),
        ("minibatches=0", r"minibatches=0 must be at least 1"),
        ("optimizer.lr=-1", r"optimizer\.lr=-1\.0 must be at least 0"),
        ("optimizer.beta2=1.5", r"optimizer\.beta2=1\.5 must be at least 0 and less than 1"),
        ("optimizer.min_lr_ratio=2", r"optimizer\.min_lr_ratio=2\.0 must be between 0 and 1"),
    ],
)
def test_values_are_checked_in_every_section(folder: Path, section: str, override: str, said: str) -> None:
    refused(config(folder, f"{section}.{override}"), ["policy"], rf"^{section}\.{said}")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["critic"], r"algorithm\.roles=\['critic'\] must hold policy \(or reward_model"),
        (["policy", "judge"], r"otherwise only rollout, reference, reward, critic, reward_model"),
        (["reward_model", "rollout"], r"rollout takes its weights from the policy; add policy"),
    ],
)
def test_roles_that_cannot_be(folder: Path, roles: list[str], said: str) -> None:
    refused(config(folder), roles, said)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", SHAPE, seed=0)
    path = tmp_path / "other" / "tokenizer.json"
    found: dict[str, Any] = json.loads(path.read_text())
    vocab = found["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(found))
    for role in ("critic", "reward_model"):
        said = (
            rf"{role}\.path=\S+other has another tokenizer than model\.path=\S+model: 2 token\(s\) differ, "
            rf"such as '1' \(id {vocab['1']} against {vocab['2']}\)"
        )
        refused(config(folder, f"{role}.path={tmp_path}/other"), ["policy", role], said)


def test_folders_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "two", SHAPE, seed=0)
    path = tmp_path / "two" / "config.json"
    found = json.loads(path.read_text())
    scored = found | {"architectures": [found["architectures"][0].replace("CausalLM", "SequenceClassification")]}
    path.write_text(json.dumps(scored))
    refused(config(folder, f"critic.path={tmp_path}/two"), ["policy", "critic"], r"num_labels=2 is not supported")
    path.write_text(json.dumps(scored | {"id2label": {"0": "good"}}))
    said = r"model\.path=\S+two is a \w+ForSequenceClassification, which has no output layer.*role policy needs"
    refused(replace(config(folder), model=replace(config(folder).model, path=f"{tmp_path}/two")), ["policy"], said)
    refused(config(folder, "critic.path=nowhere"), ["policy", "critic"], r"nowhere is not a folder")


def test_layouts_follow_the_policy_or_are_their_own(folder: Path) -> None:
    policy = RoleLayout(tensor=2, sequence_parallel=True)
    own = RoleLayout(ranks=[1], tensor=1)
    placement = usual_placement(policy=policy, critic=own)
    assert role_layout(placement, USUAL["reward_model"]) == role_layout(placement, USUAL["reference"]) == policy
    meshes = make_meshes(placement, 2)
    assert (meshes["critic"].ranks, meshes["critic"].tensor) == ((1,), 1)
    assert meshes["reward_model"] == replace(Mesh((0, 1), tensor=2), name="reward_model")
    refused(
        config(folder, "placement.critic.tensor=2"), ["policy"], r"placement\.critic\.ranks=policy takes the policy's"
    )
    layout = ["placement.critic.ranks=all", "placement.critic.tensor=3"]
    refused(config(folder, *layout), ["policy", "critic"], r"placement\.critic\.tensor=3 does not divide")


def test_memory_counts_every_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = read_spec(folder / "model")
    scalar = with_scalar_head(language)
    # one rank: 16 bytes a weight for what is trained (4 + 4 + 8) and 12 for a checkpoint of it, 4 for what is not
    needed = 28 * parameter_count(language) + 32 * parameter_count(scalar)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("aligner.check.memory.os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else needed)
    check(config(folder), ["policy", "critic", "reward_model"], world_size=1)
    monkeypatch.setattr("aligner.check.memory.os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else needed - 1)
    with pytest.raises(ValueError, match=r"the roles on this host need about"):
        check(config(folder), ["policy", "critic", "reward_model"], world_size=1)


def test_the_reference_has_sizes_of_its_own(folder: Path) -> None:
    policy = config(folder, "policy.micro_tokens=9", "policy.dtype=bfloat16", "policy.forward_micro_tokens=30")
    assert policy.reference.over(policy.policy) == policy.policy, "null is the policy's"
    own = config(folder, "reference.micro_tokens=7", "reference.dtype=float32", "policy.dtype=bfloat16")
    found = own.reference.over(own.policy)
    assert (found.dtype, found.forward_micro_tokens) == ("float32", 7)
    for override, said in (
        ("reference.micro_tokens=0", "reference.micro_tokens=0 must be at least 1, or null."),
        ("reference.dtype=float16", "reference.dtype=float16 is unknown; use float32, bfloat16, or null."),
        ("policy.share_prefix=always", "policy.share_prefix=always is unknown; use auto, on, off."),
        ("critic.forward_micro_tokens=0", "critic.forward_micro_tokens=0 must be at least 1, or null."),
    ):
        wrong = config(folder, override)
        with pytest.raises(ValueError, match=re.escape(said)):
            check_settings(wrong)
