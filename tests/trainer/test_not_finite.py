"""Batches of NaN on real ranks: weights, moments and schedule as if they had not been; then a stop, with the batch on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aligner.bounds import check_settings
from aligner.data.column_addition import ModelShape, write_model
from aligner.trainer.not_finite import NotFinite, SkipCounter
from tests.conftest import Ranks
from tests.trainer.test_parity import each

ALONE = ["loss float32 shared", "gradient bfloat16 whole", "gradient float32 fsdp"]
PAIR = [
    "loss float32 shared",
    "gradient float32 shared",
    "gradient float32 whole",
    "gradient bfloat16 shared",
    "loss bfloat16 whole tensor=2",
    "gradient float32 shared pipeline=2",
    "loss float32 shared context=2",
    "scores float32 shared",
    "loss float32 fsdp",
    "gradient bfloat16 fsdp replicas=2",
    "scores float32 fsdp",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("not_finite")
    write_model(folder / "model", ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    return folder / "model"


@pytest.mark.parametrize(("size", "case"), each({1: ALONE, 2: PAIR}))
def test_left_out_then_stopped(ranks: Ranks, model: Path, tmp_path: Path, size: int, case: str) -> None:
    ranks(size).run("tests.trainer.not_finite_on_ranks:check", model, tmp_path, case)
    check_files(tmp_path / case.replace(" ", "_") / "offending", case, size)


def check_files(folder: Path, case: str, ranks: int) -> None:
    """Each data shard's rows, once: people can read which row it was."""
    sharded = "=" not in case or "fsdp" in case
    files = sorted(path.name for path in (folder / "step_7").iterdir())
    wanted = list(range(ranks)) if sharded else [ranks - 1] if "pipeline" in case else [0]
    assert files == sorted(f"rank_{rank}.{end}" for rank in wanted for end in ("json", "safetensors"))
    assert "load_offending" in (folder / "README.md").read_text()
    rows = []
    for rank in wanted:
        told = json.loads((folder / "step_7" / f"rank_{rank}.json").read_text(), parse_constant=pytest.fail)
        tensors = load_file(folder / "step_7" / f"rank_{rank}.safetensors")
        wide = tensors["mask_BT"].shape[: 1 if case.startswith("scores") else 2]
        assert tensors["readout"].shape == tensors["loss"].shape == wide and tensors["readout"].isfinite().all()
        assert told["role"].startswith("met") and "guards.not_finite.max_in_row=2" in told["why"]
        has_bad = any(row["fields"]["row"] == 5 for row in told["rows"])
        assert ("loss" in told["not_finite"]) == (has_bad and not case.startswith("gradient"))
        rows += told["rows"]
    assert sorted(row["fields"]["row"] for row in rows) == list(range(6))
    for row in rows:
        assert (row["mean_loss"] == "nan") == (row["fields"]["row"] == 5 and not case.startswith("gradient")), row
        assert row["trained_tokens"] == row["tokens"] - 3 and isinstance(row["text"], str)


def test_counts() -> None:
    skips = SkipCounter(NotFinite(max_in_row=2, max_total=4))
    assert [skips.step_skipped() for _ in range(2)] == [None, None]
    skips.step_taken()
    assert skips.step_skipped() is None
    later = SkipCounter(NotFinite(max_in_row=2, max_total=4))
    later.restore(json.loads(json.dumps(skips.state())))
    assert later.step_skipped() is None
    assert "3 such steps in a row are more than guards.not_finite.max_in_row=2" in str(later.step_skipped())
    skips.step_taken()
    assert skips.step_skipped() is None
    skips.step_taken()
    assert "5 such steps in this run are more than guards.not_finite.max_total=4" in str(skips.step_skipped())
    assert "action=stop" in str(SkipCounter(NotFinite(action="stop")).step_skipped())


@pytest.mark.parametrize("wrong", [{"action": "warn"}, {"max_in_row": -1}, {"max_total": -1}])
def test_what_cannot_work_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"guards.not_finite.{next(iter(wrong))}="):
        check_settings(NotFinite(**wrong), "guards.not_finite")
