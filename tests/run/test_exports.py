"""Exports while a run trains: which stand when, what they hold, and that neither a full disk nor a kill spoils one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Ranks
from tests.e2e.conftest import Task, task
from tests.pool import RankError

__all__ = ["task"]

Scene = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def scene(ranks: Ranks, task: Task, tmp_path: Path) -> Scene:
    """scene(name, *overrides): what both ranks have seen."""

    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        return ranks(2).run("tests.run.exports_on_ranks:play", task.folder, tmp_path, name, list(overrides))

    return run


def doubled(folder: Path, task: Task, times: int, dtype: torch.dtype = torch.float32) -> None:
    """The folder is the task's model, each weight doubled so often, to the last bit, as transformers reads it."""
    found = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(task.folder / "model").state_dict()
    assert found.dtype == dtype
    assert found.state_dict().keys() == start.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, (start[name] * 2.0**times).to(dtype)), name
    text = "12+34"
    ids = [AutoTokenizer.from_pretrained(path).encode(text) for path in (folder, task.folder / "model")]
    assert ids[0] == ids[1] and ids[0]
    assert found.generation_config.eos_token_id is not None


def test_which_stand_after_each_step(scene: Scene, task: Task, tmp_path: Path) -> None:
    """Every 2 steps, the 2 newest, and the best beside them; worked by hand. Only rank 0 has the figures."""
    first, second = scene("steps")
    expected = [
        # best, what stands
        (0, [0]),
        (0, [0]),
        (0, [0, 2]),
        (3, [2, 3]),
        (3, [2, 3, 4]),
        (3, [2, 3, 4]),
        (3, [3, 4, 6]),
        (7, [4, 6, 7]),
    ]
    figures = {0: -0.5, 3: -0.75, 7: -0.9}
    for step, (best, stand) in enumerate(expected):
        seen = first["seen"][step]
        assert seen["best"] == f"exports/step_{best}", step
        assert seen["exports"] == [f"step_{n}" for n in stand], step
        assert seen["figures"] == {"metric": "heldout_loss", "step": best, "value": figures[best]}
    assert [seen["wrote"] for seen in second["seen"]] == [True, False, True, True, True, False, True, True]
    assert [seen["step"] for seen in second["seen"]] == [best for best, _ in expected], "rank 1 decides alike"
    assert not first["notes"] and not first["failed"]
    assert first["looks"] > 100 and not first["misses"], "a reader found no whole best"
    doubled(tmp_path / "best", task, 7)
    readable = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "best").iterdir()}
    assert set(readable.values()) == {readable["config.json"]}, (
        "whoever may read the configuration may read the weights"
    )
    doubled(tmp_path / "exports" / "step_4", task, 4)
    doubled(tmp_path / "exports" / "step_6", task, 6)
    assert first["summary"][1] == f"best:    {tmp_path / 'best'} (step 7, heldout_loss -0.9)"


def test_a_full_disk_is_a_warning(scene: Scene, task: Task, tmp_path: Path) -> None:
    """Rank 1 cannot write at steps 1 and 4: nothing half stands, the best stays, and the next that beats it is kept."""
    first, second = scene("full disk", "policy.dtype=bfloat16")
    seen = first["seen"]
    assert [row["best"] for row in seen] == [f"exports/step_{best}" for best in (0, 0, 2, 2, 2)]
    assert [row["exports"] for row in seen] == [["step_0"], ["step_0"], ["step_2"], ["step_2"], ["step_2"]]
    assert first["failed"] == second["failed"] == 2
    assert len(first["notes"]) == 2 and first["notes"] == second["notes"]
    for step, note in zip((1, 4), first["notes"], strict=True):
        assert note.startswith(f"WARNING: the export of step {step} failed on rank 1: ")
        assert "File too large" in note and note.endswith("the training goes on.")
    assert "WARNING: 2 export(s) could not be written" in first["summary"][-1]
    assert not first["misses"]
    doubled(tmp_path / "best", task, 2, torch.bfloat16)


@pytest.mark.matrix
def test_a_kill_in_the_middle_leaves_the_best_whole(scene: Scene, task: Task, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=f"ended with status -{signal.SIGXFSZ.value}"):
        scene("killed")
    doubled(tmp_path / "best", task, 0)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["value"] == -0.5
    half = list((tmp_path / "exports" / ".step_1.partial").iterdir())
    assert half and all(file.stat().st_size <= 4096 for file in half), "they were killed somewhere else"
    scene("again")  # what was half written is gone, all else is there
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step_0"]
    doubled(tmp_path / "best", task, 0)
    scene("none")  # a run that is overwritten
    assert not list((tmp_path / "exports").iterdir()) and not (tmp_path / "best").is_symlink()
