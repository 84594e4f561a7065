"""From a file in the schema of each named format to its first updates: SFT, DPO or GRPO, whatever its rows are for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligner.data.formats import FORMATS
from tests.algorithms.methods import run_method
from tests.conftest import Ranks
from tests.data.format_rows import SAMPLES, Sample

LOOPS = {
    "preferences": ["algorithm=dpo", "data=preferences"],
    "demonstrations": ["algorithm=sft", "data=demonstrations"],
    "prompts": [
        "algorithm=grpo",
        "algorithm.group_size=4",
        "algorithm.loss.entropy_coef=0.05",
        "rollout.max_model_len=440",
    ],
}
"""data.kind -> a loop for it, the cheapest of what a format has first."""
STREAMED = ("tulu3_sft", "ultrafeedback", "dapo_17k")


def sample_of(name: str) -> Sample:
    return next(s for kind in LOOPS for s in SAMPLES if (s.format, s.kind) == (name, kind) and not s.needs)


@pytest.mark.parametrize("name", FORMATS)
def test_a_first_update(name: str, ranks: Ranks, task: Any, tmp_path: Path) -> None:
    sample, streamed = sample_of(name), name in STREAMED
    path = tmp_path / ("rows.parquet" if streamed else "rows.jsonl")
    if streamed:
        pq.write_table(pa.Table.from_pylist([sample.row] * 8), path)
    else:
        path.write_text((json.dumps(sample.row) + "\n") * 8)
    case = [
        *LOOPS[sample.kind], f"data.path={path}", f"data.format={name}", "data.prompts_per_step=4", "data.max_tokens=512",
        "data.max_prompt_tokens=400", "policy.micro_tokens=2048", f"data.streaming={str(streamed).lower()}",
    ]  # fmt: skip
    rows = run_method(ranks(1), task.folder, case, {"one rank": []})["one rank"]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["grad_norm"] > 0
