"""What may be replaced: a model alone, of the run that wants to; never what somebody else has put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.models.ownership import check_replaceable, mark, others_files, run_of


def model(folder: Path, *more: str, run: str | None = None, marked: bool = True) -> Path:
    """A model's folder; `more` is put there after it was written."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    if marked:
        mark(folder, run)
    for name in more:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def test_ones_own_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "not there", "a")
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", "a")
    own = model(tmp_path / "own", "best.json", run="a")
    check_replaceable(own, "a")
    check_replaceable(own)  # a conversion, say
    assert run_of(own) == "a" and others_files(own) == []


@pytest.mark.parametrize("run", ["b", None])
@pytest.mark.parametrize("marked", [True, False])
def test_another_runs_model(run: str | None, marked: bool, tmp_path: Path) -> None:
    theirs = model(tmp_path / "theirs", run=run, marked=marked)
    with pytest.raises(ValueError, match=r"is a model that this run has not written, and would be replaced"):
        check_replaceable(theirs, "a")
    check_replaceable(theirs)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("more", ["notes.md", "data/prompts.jsonl", "optimizer.pt", ".git/HEAD", "pytorch_model.bin"])
def test_what_else_lies_there(more: str, marked: bool, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", more, run="a", marked=marked)
    with pytest.raises(ValueError, match=rf"holds what was not written with it: {more.split('/')[0]}; move that"):
        check_replaceable(folder, "a" if marked else None)
    assert (folder / more).read_text() == "mine"


def test_a_file_of_a_usual_name_that_was_not_written_with_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "adapter_model.safetensors", run="a")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        check_replaceable(folder, "a")


def test_a_link_and_what_is_no_model(tmp_path: Path) -> None:
    target = model(tmp_path / "target", run="a")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match=f"link is a link to {target}"):
        check_replaceable(tmp_path / "link", "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is a link to"):
        check_replaceable(tmp_path / "dangling")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match="not a checkpoint that could be replaced"):
            check_replaceable(tmp_path / name, "a")


def test_what_an_earlier_version_left_is_adopted_without_what_lies_beside_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "notes.md", marked=False)
    mark(folder, "a", adopted=True)
    assert run_of(folder) == "a" and others_files(folder) == ["notes.md"]
