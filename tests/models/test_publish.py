"""A folder that replaces another: it is whole at every moment, and nothing is left beside it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from aligner.models import hf_folder
from aligner.models.hf_folder import publish

FILES = ("config.json", "model.safetensors")


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux")
def test_a_reader_finds_one_at_every_moment(tmp_path: Path) -> None:
    final, looks, misses, done = make(tmp_path / "model", "0"), 0, 0, threading.Event()

    def look() -> None:
        nonlocal looks, misses
        while not done.is_set():
            looks += 1
            misses += not (final / "config.json").exists()

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(1, 200):
            publish(make(tmp_path / ".model.partial", str(number)), final)
            assert {(final / name).read_text() for name in FILES} == {str(number)}
    finally:
        done.set()
        reader.join()
    assert looks > 200 and not misses
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, as the kernel answers for a name that is not there."""
    assert not hf_folder._exchange(tmp_path / "nothing", tmp_path / "nowhere")
    monkeypatch.setattr(hf_folder, "_exchange", lambda one, other: False)
    final = make(tmp_path / "model", "0")
    for number in range(1, 4):
        publish(make(tmp_path / ".model.partial", str(number)), final)
        assert (final / "config.json").read_text() == str(number)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
