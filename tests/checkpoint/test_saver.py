"""What goes wrong in a saver's thread is told, and nobody takes such a checkpoint for whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.checkpoint import folder, saver
from aligner.checkpoint.saver import Saver

Savers = Callable[..., list[Saver]]
TENSORS = {"weights": torch.arange(8, dtype=torch.float32)}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dist.TCPStore]]:
    """The launcher's store, which ends with it; the test may clear the list."""
    held = [dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(held[0].port))
    yield held
    held.clear()


@pytest.fixture
def savers(store: list[dist.TCPStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Savers:
    """savers(ranks): each rank's, of one job."""

    def make(ranks: int) -> list[Saver]:
        made = []
        for rank in range(ranks):
            monkeypatch.setattr(saver, "_SAVERS", iter([0]))
            world: Any = SimpleNamespace(
                rank=rank, size=ranks, attempt="a", activity=SimpleNamespace(tick=lambda: None)
            )
            made.append(Saver(world, tmp_path, keep=2, beside=True))
        return made

    return make


def save(each: list[Saver], step: int) -> None:
    for one in each:
        one.save(step, {}, {"tensors": {}}, TENSORS, {})
    for one in reversed(each):
        one.wait()


def test_a_good_save_is_whole(savers: Savers, tmp_path: Path) -> None:
    each = savers(2)
    save(each, 3)
    assert [one.trouble for one in each] == ["", ""] and each[0].last == tmp_path / "step-00000003"


@pytest.mark.parametrize("error", [RuntimeError("a fault"), MemoryError("none left"), ValueError("no"), KeyError("x"),
                                   OSError(28, "No space left on device")], ids=lambda one: type(one).__name__)  # fmt: skip
@pytest.mark.parametrize("where", ["rank 1's part", "the name"])
def test_any_error_is_a_warning(
    error: Exception, where: str, savers: Savers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    each = savers(2)
    save(each, 2)
    real = folder.write_tensors

    def failing(*given: Any, **more: Any) -> Any:
        if where == "the name" or "rank-00001" in str(given[0]):
            raise error
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(
            *((saver, "publish_checkpoint", failing) if where == "the name" else (folder, "write_tensors", failing))
        )
        save(each, 4)
    said = capsys.readouterr().err
    assert each[0].trouble and "WARNING: the checkpoint of step 4 could not be written" in said
    kind = "No space left" if isinstance(error, OSError) else f"{type(error).__name__}: "
    assert kind in said and "the last complete checkpoint is step-00000002" in said
    assert ("Traceback" in said) == (not isinstance(error, OSError)), "a fault of ours is shown whole"
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000002"]
    save(each, 6)  # and the next one is whole
    assert [one.trouble for one in each] == ["", ""]
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000006", "step-00000002"]


def test_a_launcher_that_ends_in_a_save(
    store: list[dist.TCPStore], savers: Savers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank waits for the second's part, and the launcher's store goes: no checkpoint, and no lost thread."""
    lost: list[Any] = []
    threading.excepthook, before = lost.append, threading.excepthook
    try:
        each = savers(2)
        each[0].save(5, {}, {"tensors": {}}, TENSORS, {})
        while not each[0]._store.check(["1/0"]):
            pass
        store.clear()
        each[1].save(5, {}, {"tensors": {}}, TENSORS, {})
        for one in each:
            one.wait()
    finally:
        threading.excepthook = before
    assert each[0].trouble and not lost
    assert folder.complete(tmp_path) == []
    said = capsys.readouterr().err
    assert "the checkpoint of step 5 could not be written" in said and "Traceback" not in said
    assert "Training continues" not in said and "The last complete checkpoint is none of this run." in said
    assert os.listdir(tmp_path) in ([], [".step-00000005.partial"])
