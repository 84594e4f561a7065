"""Further models in a job: who uses them, their folders, tokenizers, heads and memory, said before a model is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aligner.check.job import Checked
from aligner.check.memory import Machine, bytes_of_roles
from aligner.check.roles import check_engines, wanted_roles
from aligner.check.summary import job_summary
from aligner.config.schema import Config, compose_config, to_config
from aligner.data.column_addition import ModelShape, write_model
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.models.tensors import parameter_count
from aligner.run.prepare import prepare
from aligner.spmd.placement import make_meshes
from tests.check.whole import check

SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
SMALL = ModelShape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=32, ffn=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a smaller one, one of another tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("roles")
    write_model(folder / "model", SHAPE, seed=0)
    write_model(folder / "small", SMALL, seed=1)
    write_model(folder / "other", SMALL, seed=1)
    path = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(tokenizer))
    rows = [{"prompt": "<bos>1+2=", "answer": "3"}] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, *overrides: str) -> Config:
    settings = (f"model.path={folder}/model", f"data.path={folder}/rows.jsonl", f"run_dir={folder}/run")
    sizes = ("data.prompts_per_step=4", "sampling.max_tokens=16", "rollout.kv_cache_mib=8", "train.eval_every=0")
    return to_config(compose_config([*settings, *sizes, *overrides]))


def checked(folder: Path, roles: list[str], *overrides: str, ranks: int = 2) -> Checked:
    found = config(folder, *overrides)
    return check(found, wanted_roles(found, roles), ranks)


def model(folder: Path, name: str, kind: str, of: str = "small", more: str = "") -> str:
    return f"models.{name}={{kind: {kind}, path: {folder}/{of}{more}}}"


def test_models_of_every_kind_pass(folder: Path) -> None:
    given = [
        model(folder, kind, name)
        for kind, name in (("a", "policy"), ("b", "frozen"), ("c", "critic"), ("d", "reward_model"))
    ]
    given += [model(folder, "e", "engine", "other", ", own_tokenizer: true"), "placement.b.ranks=[1]"]
    found = checked(folder, ["policy", "rollout", "a", "b", "c", "d", "e"], *given)
    small = read_spec(folder / "small")
    assert parameter_count(found.specs["a"]) == parameter_count(found.specs["b"]) == parameter_count(small)
    assert (
        parameter_count(found.specs["c"])
        == parameter_count(found.specs["d"])
        == parameter_count(with_scalar_head(small))
    )
    assert found.meshes["b"].ranks == (1,) and found.meshes["e"].ranks == (0, 1)
    assert found.models["e"].max_model_len == small.max_positions, "an engine has a length"


@pytest.mark.parametrize(
    ("roles", "given", "said"),
    [
        (["policy"], ["models.a={kind: frozen, path: FOLDER/small}"], r"models\.a is a model that nobody uses: add a to algorithm\.roles=\['policy'\], or leave"),
        (["policy"], ["models.a={kind: reward_model, path: FOLDER/small}"], r"name it in a component of the reward \(reward\.components\.X\.model=a\)"),
        (["policy", "judge"], [], r"otherwise only rollout, .* \(a further model is models\.judge="),
        (["policy", "a"], ["models.a={kind: frozen, path: FOLDER/other}"], r"models\.a\.path=\S+other has another tokenizer .* use a model of the same tokenizer\.$"),
        (["policy", "a"], ["models.a={kind: engine, path: FOLDER/other}"], r"another tokenizer .*or set models\.a\.own_tokenizer=true"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/nowhere}"], r"nowhere is not a folder"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/small, minibatches: 9}"], r"models\.a\.minibatches=9 is more than the 4"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/small, optimizer: {lr: -1}}"], r"models\.a\.optimizer\.lr=-1\.0 must be at least 0"),
        (["policy", "a"], ["models.a={kind: frozen, path: FOLDER/small, micro_tokens: 0}"], r"models\.a\.micro_tokens=0 must be at least 1"),
        (["policy", "a"], ["models.a={kind: engine, path: FOLDER/small, dtype: float8}"], r"models\.a\.dtype=float8 is unknown; use float32, bfloat16, float16"),
        (["policy", "a"], ["models.a={kind: engine, path: FOLDER/small, max_num_seqs: 0}"], r"models\.a\.max_num_seqs=0 must be at least 1"),
        (["policy", "a"], ["models.a={kind: engine, path: FOLDER/small, max_model_len: 9999}"], r"models\.a\.max_model_len=9999 is beyond the \d+ positions"),
        (["policy", "a"], ["models.a={kind: engine, path: FOLDER/small}", "placement.a={ranks: all, tensor: 4}"], r"placement\.a\.tensor=4 does not divide"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/small}", "placement.a.ranks=[5]"], r"placement\.a\.ranks=\[5\] names rank\(s\) \[5\]"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/small}", "placement.a.ranks={x: 1}"], r"placement\.a\.ranks=\{'x': 1\} is not understood"),
        (["policy", "a"], ["models.a={kind: policy, path: FOLDER/small}", "residency.keep=[a.cache]"], r"residency\.keep has 'a\.cache'.* a, a\.weights, a\.gradients"),
        (["policy", "rollout", "reward"], ["+reward.components.x.model=taste"], r"model=taste is no role; use one of the reward models reward_model, or define"),
        (["policy", "rollout", "reward", "a"], ["models.a={kind: frozen, path: FOLDER/small}", "+reward.components.x.model=a"], r"model=a is a frozen, a frozen language model"),
        (["policy", "rollout", "reward"], ["+reward.components.x.model=true"], r"needs the role reward_model; add it to algorithm\.roles"),
    ],
)  # fmt: skip
def test_mistakes_name_the_setting(folder: Path, roles: list[str], given: list[str], said: str) -> None:
    overrides = [text.replace("FOLDER", str(folder)) for text in given]
    with pytest.raises(ValueError, match=said):
        checked(folder, roles, "reward.rule=''", *overrides)


def test_a_component_brings_its_model_along(folder: Path) -> None:
    found = config(folder, "reward=two_models", *(model(folder, name, "reward_model") for name in ("helpful", "safe")))
    assert wanted_roles(found, ["policy", "rollout", "reward"]) == ["policy", "rollout", "reward", "helpful", "safe"]
    assert wanted_roles(found, ["policy"]) == ["policy"]
    check(found, wanted_roles(found, ["policy", "rollout", "reward"]), 2)


def test_memory_counts_every_model(folder: Path) -> None:
    """4 bytes a weight of a frozen model or an engine, 16 of one that is trained on one shard, by hand."""
    kinds = {"actor": "policy", "teacher": "frozen", "taste": "reward_model", "judge": "engine"}
    found = config(folder, *(model(folder, name, kind) for name, kind in kinds.items()), "models.judge.kv_cache_mib=3")
    language = read_spec(folder / "small")
    specs = {
        "policy": read_spec(folder / "model"),
        **dict.fromkeys(kinds, language),
        "taste": with_scalar_head(language),
    }
    held = bytes_of_roles(found, specs, make_meshes(found.placement, 1, found.roles), Machine(1, 1 << 30, None))
    assert held["actor"] == 16 * parameter_count(language) and held["teacher"] == 4 * parameter_count(language)
    assert held["taste"] == 4 * parameter_count(with_scalar_head(language))
    assert held["judge"] == 4 * parameter_count(language) + (3 << 20)


def test_engines_that_share_a_gpu(folder: Path) -> None:
    found = config(folder, model(folder, "judge", "engine"))
    spec = read_spec(folder / "model")
    specs, meshes = {"rollout": spec, "judge": spec}, make_meshes(found.placement, 2, found.roles)
    gpu = Machine(2, 1 << 40, 80 * 2.0**30)
    with pytest.raises(
        ValueError, match=r"rollout and judge share rank 0, .*\(placement\.judge\.ranks\), or set residency\.mode=off"
    ):
        check_engines(found, specs, meshes, gpu)
    check_engines(found, specs, meshes, replace(gpu, device_bytes=None))
    check_engines(config(folder, model(folder, "judge", "engine"), "residency.mode=off"), specs, meshes, gpu)


def test_the_summary_names_them(folder: Path) -> None:
    given = [model(folder, name, kind) for name, kind in (("teacher", "frozen"), ("actor", "policy"))]
    found = config(folder, *given, "placement.teacher.ranks=[1]", "algorithm.roles=[policy,rollout,reward,teacher,actor]", "mode=check", "check.ranks=2", "reward.rule=aligner.reward.rules.exact_match")  # fmt: skip
    job = prepare(found, 2)
    text = job_summary(job.config, job.roles, job.checked, 2)
    line = next(line for line in text.splitlines() if line.strip().startswith("teacher"))
    assert "rank 1: whole" in line and line.endswith(f"frozen from {folder}/small")
    assert any(line.strip().startswith("actor") and ", learns, " in line for line in text.splitlines())
