"""Further models: every way to write one composes into typed settings, and mistakes name the setting and what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.config.help import help_text
from aligner.config.models import SETTINGS, EngineSettings, FrozenSettings, PolicySettings, RewardModelSettings
from aligner.config.schema import Config, compose_config, to_config
from aligner.spmd.placement import RoleLayout, make_meshes
from aligner.spmd.role_table import MODEL_KINDS, USUAL


def config(*overrides: str) -> Config:
    return to_config(compose_config(["model.path=folder", *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["models.judge={kind: engine, path: b, max_num_seqs: 4}"],
        ["+models.judge={kind: engine, path: b}", "models.judge.max_num_seqs=4"],
        ["models.judge.kind=engine", "+models.judge.path=b", "+models.judge.max_num_seqs=4"],
    ],
)
def test_ways_to_write_a_model(overrides: list[str]) -> None:
    found = config(*overrides)
    assert found.models == {"judge": EngineSettings(path="b", max_num_seqs=4)}
    assert found.placement["judge"] == RoleLayout(ranks="rollout")
    assert found.model_path("judge") == ("models.judge.path", "b")
    assert found.role("judge").section == "models.judge" and list(found.roles) == [*USUAL, "judge"]


def test_settings_of_each_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    found = config(
        "models.actor={kind: policy, path: $MODELS/a, optimizer: {lr: 1}, epochs: 2}",
        "models.taste={kind: reward_model, path: '${model.path}'}",
        "models.teacher={kind: frozen, path: t, micro_tokens: 64}",
        "models.value={kind: critic, path: v}",
        "policy.dtype=bfloat16",
        "placement.teacher.ranks=[1]",
        "+placement.value={ranks: 0-1, tensor: 2}",
        "placement.actor=${placement.policy}",
    )
    actor = found.models["actor"]
    assert isinstance(actor, PolicySettings)
    assert (actor.path, actor.optimizer.lr, actor.epochs) == (f"{tmp_path}/a", 1.0, 2)
    assert found.models["taste"] == RewardModelSettings(path="folder")
    assert found.models["teacher"] == FrozenSettings(path="t", micro_tokens=64)
    teacher = found.settings("teacher")
    assert (teacher.dtype, teacher.forward_micro_tokens) == ("bfloat16", 64), "what it leaves out is the policy's"
    assert found.settings("actor") is actor and found.settings("critic") is found.critic
    layouts = {name: found.placement[name] for name in found.models}
    assert layouts == {
        "actor": RoleLayout(), "taste": RoleLayout(ranks="policy"), "teacher": RoleLayout(ranks=(1,)),
        "value": RoleLayout(ranks="0-1", tensor=2),
    }  # fmt: skip
    meshes = make_meshes(found.placement, 4, found.roles)
    assert [meshes[name].ranks for name in found.models] == [(0, 1, 2, 3), (0, 1, 2, 3), (1,), (0, 1)]
    assert meshes["value"].tensor == 2 and meshes["taste"].name == "taste"


def test_models_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [schema, _self_]\nmodel: {path: m}\nmodels: {judge: {kind: engine, path: j}}\n"
        "placement: {judge: {ranks: 50%-100%, tensor: 2}}\n"
    )
    found = to_config(compose_config(["models.judge.dtype=bfloat16"], "mine", tmp_path))
    assert found.models == {"judge": EngineSettings(path="j", dtype="bfloat16")}
    assert found.placement["judge"] == RoleLayout(ranks="50%-100%", tensor=2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["models.j.path=x"], "models.j has no kind; use policy (a trained language model); frozen"),
        (["models.j={kind: engin, path: x}"], "models.j.kind=engin is unknown; use policy"),
        (["models.j={kind: policy}"], "models.j.path has no value; give it on the command line: models.j.path=..."),
        (["models.j={kind: policy, pth: x}"], "there is no setting models.j.pth; did you mean models.j.path?"),
        (["models.j={kind: engine, path: x, epochs: 2}"], "there is no setting models.j.epochs; models.j has engine"),
        (["models.j={kind: policy, path: x, epochs: 1.5}"], "models.j.epochs: Value '1.5' of type 'float' could not"),
        (["models.j={kind: policy, path: x, optimizer: {lr: high}}"], "models.j.optimizer.lr: Value 'high'"),
        (["models.j={kind: policy, path: x, optimizer: {lrr: 1}}"], "there is no setting models.j.optimizer.lrr"),
        (["models.j=x"], "models.j=x is not possible; set its keys"),
        (["models=x"], "models=x is not possible; set models.NAME"),
        (["models.critic={kind: critic, path: x}"], "critic is a role with a section of its own; set critic.*"),
        (["models.exports={kind: policy, path: x}"], "run_dir/exports is a run's own; choose another name"),
        (["models.a-b={kind: policy, path: x}"], "models.a-b: a model's name is a word of letters, digits and _"),
        (["placement.judge.ranks=[0]"], "placement.judge is of no role: there is no models.judge"),
        (["placement.rolout.ranks=[0]"], "did you mean placement.rollout?"),
        (["models.j={kind: policy, path: x}", "placement.j.tensor=two"], "placement.j.tensor: Value 'two' of type"),
        (["models.j={kind: policy, path: x}", "placement.j.tensro=2"], "did you mean placement.j.tensor?"),
        (["models.j={kind: policy, path: x}", "placement.j=2"], "placement.j=2 is not possible; set its keys"),
    ],
)
def test_mistakes_name_the_setting(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        config(*overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("placement.j.tensor=2", r"placement\.j\.ranks=policy takes the policy's sizes too"),
        ("placement.j.ranks=[7]", r"placement\.j\.ranks=\[7\] names rank\(s\) \[7\], but the job has 4"),
        ("placement.e.tensor=2", r"placement\.e\.ranks=rollout takes the rollout's sizes too"),
        ("placement.e={ranks: all, context: 2}", r"placement\.e\.context=2 is not supported for e; use 1"),
        (
            "placement.e={ranks: all, tensor: 2, expert: 4}",
            r"placement\.e\.expert=4 .* 1, or 2 \(placement\.e\.tensor\)",
        ),
        (
            "placement.e={ranks: all, sequence_parallel: true}",
            r"placement\.e\.sequence_parallel=true needs .*, j\) with",
        ),
    ],
)
def test_placements_that_cannot_be(override: str, said: str) -> None:
    found = config("models.j={kind: policy, path: x}", "models.e={kind: engine, path: x}", override)
    with pytest.raises(ValueError, match=said):
        make_meshes(found.placement, 4, found.roles)


def test_help_names_every_kind() -> None:
    text = help_text()
    assert SETTINGS.keys() == MODEL_KINDS.keys()
    for kind in MODEL_KINDS:
        assert f"  models.NAME.kind={kind}: " in text
    for words in (
        "The fields of policy.*, and:",
        "  models.NAME.own_tokenizer=False",
        "  placement.critic.ranks=policy",
    ):
        assert words in text, words
