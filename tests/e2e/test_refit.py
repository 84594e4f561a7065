"""After training and a sync, the rollout answers exactly as a fresh vLLM engine that loads the exported checkpoint.

The job runs a loop from a file outside the package, as a user's own loop would.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

LOOP = """
import json
from dataclasses import dataclass
from pathlib import Path

from aligner.algorithms.grpo import GrpoConfig, grpo
from aligner.rollout.config import Sampling


@dataclass(frozen=True)
class LoopConfig(GrpoConfig):
    out: str = ""
    last: int = 5


def loop(roles, prompts, cfg: LoopConfig):
    seen = []
    def remember():
        for batch in prompts:
            seen.append(batch)
            yield batch
    for step, result in enumerate(grpo(roles, remember(), cfg), start=1):
        if step == cfg.last:
            answer_and_export(roles, [prompt for batch in seen for prompt in batch], Path(cfg.out))
        yield result


def answer_and_export(roles, batch, out):
    samples = roles.rollout.generate(batch, sampling=Sampling(temperature=0.0, max_tokens=24), seed=0)
    roles.policy.save_checkpoint(out / "export")
    rows = samples.gather()
    stats = [vars(row) for sync in roles.policy.syncs.by_rollout.values() for row in sync.stats]
    if roles.policy.world.rank == 0:
        answers = [rows.response_tokens(row) for row in range(rows.rows)]
        found = {"prompts": [prompt.tokens for prompt in batch], "answers": answers, "stats": stats}
        (out / "greedy.json").write_text(json.dumps(found))
"""
FRESH = """
import json, sys
from vllm.platforms import current_platform
type(current_platform).simple_compile_backend = "eager"
from vllm import LLM, SamplingParams
found = json.load(open(sys.argv[1] + "/greedy.json"))
llm = LLM(sys.argv[1] + "/export", dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=16 << 20)
out = llm.generate([{"prompt_token_ids": p} for p in found["prompts"]],
                   SamplingParams(temperature=0, max_tokens=24, detokenize=False), use_tqdm=False)
answers = [list(x.outputs[0].token_ids) for x in out]
assert answers == found["answers"], "the synced engine answers otherwise than a fresh one"
assert len({tuple(a) for a in answers}) > 1
print("equal answers:", len(answers))
"""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("placement.policy.tensor=2",), marks=pytest.mark.matrix),
        ("placement.policy.pipeline=2", "placement.rollout.tensor=2"),
        pytest.param(("placement=split",), marks=pytest.mark.matrix),
        pytest.param(
            ("placement.policy.context=2", "policy.recompute=selective", "policy.minibatches=2"),
            marks=pytest.mark.matrix,
        ),
    ],
    ids=["tp2_to_2xtp1", "pp2_to_tp2", "split", "cp2_to_2xtp1"],
)
def test_synced_engine_equals_a_fresh_one(layout: tuple[str, ...], job: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own_loop.py").write_text(LOOP)
    job(2, *layout, "algorithm._target_=own_loop.loop", f"+algorithm.out={tmp_path}", "policy.optimizer.lr=1e-3")
    stats = json.loads((tmp_path / "greedy.json").read_text())["stats"]
    assert len(stats) == 6
    # rank 0's own account: as destination it proves what it got, as a source alone it has only sent
    assert all(row["checksummed"] > 0 or row["moved_bytes"] > 0 for row in stats)
    (tmp_path / "fresh.py").write_text(FRESH)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = fork_server.run(
        [sys.executable, str(tmp_path / "fresh.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=150, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal answers: 20" in done.stdout
