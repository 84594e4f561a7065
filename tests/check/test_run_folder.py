"""What a run would replace, and what it reads: refused before anything is built, and untouched."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from aligner.check.run_folder import adopt, check_places, check_sources
from aligner.checkpoint.claim import Start, claim
from aligner.config.run import TrainConfig
from aligner.config.schema import Config
from aligner.models.ownership import mark, run_of


def config(run_dir: Path | str, **train: object) -> Config:
    return Config(run_dir=str(run_dir), train=TrainConfig(**train))  # type: ignore[arg-type]


def model(folder: Path, run: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if run is not None:
        mark(folder, run)
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


EXPORTING = {"save": False, "export_every": 5}
FOREIGN = {
    "a model": ("model/config.json", {}, r"policy's model \(train\.save=true\).*has not written"),
    "no model": ("model/thesis.tex", {}, r"not a checkpoint that could be replaced"),
    "a critic": ("critic/config.json", {}, r"critic's model"),
    "an export": ("exports/step_5/config.json", EXPORTING, r"exports of this run.*has not written"),
    "a best": ("best/config.json", {"save": False, "keep_best": True}, r"best is not a link to an export of this run"),
    "a configuration": ("config.yaml", {}, r"config\.yaml is not of a run"),
}


@pytest.mark.parametrize("which", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_this_runs(which: str, overwrite: bool, tmp_path: Path) -> None:
    name, train, said = FOREIGN[which]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    wanted = replace(config(tmp_path, **train), overwrite=overwrite)
    if which == "a configuration" and overwrite:
        return check_places(wanted, ["policy", "critic"])
    with pytest.raises(ValueError, match=rf"(?s)run_dir={tmp_path} is where .*{said}.*choose another run_dir"):
        check_places(wanted, ["policy", "critic"])
    assert snapshot(tmp_path) == before


def test_what_would_not_be_replaced_may_lie_there(tmp_path: Path) -> None:
    model(tmp_path / "model")
    model(tmp_path / "critic")
    check_places(config(tmp_path, save=False), ["policy", "critic"])
    (tmp_path / "model").rename(tmp_path / "other")
    check_places(config(tmp_path), ["policy"])


def test_ones_own_is_replaced_by_whoever_goes_on_or_overwrites(tmp_path: Path) -> None:
    run = claim(tmp_path, Start.NEW)
    model(tmp_path / "model", run)
    model(tmp_path / "exports" / "step_5", run)
    (tmp_path / "best").symlink_to("exports/step_5")
    check_places(config(tmp_path, keep_best=True), ["policy"])
    assert claim(tmp_path, Start.NEW) == claim(tmp_path, Start.RESUME) == run
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("../their/model")
    with pytest.raises(ValueError, match="best is not a link to an export"):
        check_places(config(tmp_path, keep_best=True), ["policy"])


def test_a_run_of_an_earlier_version_keeps_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / ".launch").write_text(json.dumps({"launch": "x", "finished": 5}))
    model(tmp_path / "model")
    model(tmp_path / "exports" / "step_5")
    check_places(config(tmp_path, keep_best=True), ["policy"])
    run = claim(tmp_path, Start.RESUME)
    adopt(tmp_path, run)
    assert run_of(tmp_path / "model") == run_of(tmp_path / "exports" / "step_5") == run
    check_places(config(tmp_path, keep_best=True), ["policy"])


def test_a_new_run_leaves_what_lies_beside_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "epoch_1").mkdir()
    (tmp_path / "checkpoints" / "epoch_1" / "weights.pt").write_text("mine")
    claim(tmp_path, Start.NEW)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_1"]


def test_what_is_read_does_not_lie_where_folders_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    model(run / "model")
    model(run / "critic")
    model(run / "exports" / "step_5")
    model(run / "checkpoints" / "step-00000005" / "policy")
    other.mkdir()
    (other / "link").symlink_to(run / "model", target_is_directory=True)
    (other / "run").symlink_to(run, target_is_directory=True)
    (run / "best").symlink_to("exports/step_5")
    (run / "model" / "prompts.jsonl").touch()
    monkeypatch.chdir(other)
    spellings: dict[str, tuple[str, str | Path]] = {
        "as it is": ("model.path", run / "model"),
        "a link": ("model.path", other / "link"),
        "relative": ("model.path", "../run/model"),
        "dots": ("model.path", f"{other}/../run/exports/../model"),
        "through a linked run": ("reference.path", other / "run" / "model"),
        "best": ("reference.path", run / "best"),
        "an export": ("model.path", run / "exports" / "step_5"),
        "a checkpoint": ("model.path", run / "checkpoints" / "step-00000005" / "policy"),
        "a critic": ("critic.path", run / "critic"),
        "data": ("data.path", run / "model" / "prompts.jsonl"),
    }
    for run_dir in (run, Path("../run"), other / "run"):
        for how, (setting, path) in spellings.items():
            with pytest.raises(ValueError, match=rf"{setting}={path} (lies in|is an export of)") as error:
                check_sources(config(run_dir), {setting: str(path)}, ["policy", "critic"])
            assert "choose another run_dir" in str(error.value), how
    check_sources(config(run, save=False), {"model.path": str(run / "model")}, ["policy"])
    check_sources(config(run), {"model.path": str(tmp_path / "start"), "data.eval_path": None}, ["policy"])
    check_sources(config(other / "new"), {"model.path": str(run / "model")}, ["policy"])
    check_sources(config(run), {"model.path": str(run / "models")}, ["policy"])


@pytest.mark.parametrize("inside", ["model", "model/again", "exports/step_5", "checkpoints/new", "critic"])
def test_a_run_does_not_lie_in_what_another_replaces(inside: str, tmp_path: Path) -> None:
    claim(tmp_path, Start.NEW)
    with pytest.raises(ValueError, match=f"lies in the run in {tmp_path}, which replaces"):
        check_places(config(tmp_path / inside), ["policy"])
    check_places(config(tmp_path / "another"), ["policy"])
