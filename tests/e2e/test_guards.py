"""Guards in whole jobs of 2 ranks: bad batches are passed over and noted, one message ends every rank, the batch is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligner.trainer.offending_batch import load_offending

OWN = '''
import torch

from aligner.objective.losses import negative_log_likelihood

calls = 0


def nan_in(policy_logp_BT, *, mask_BT, steps):
    """Imitation, but NaN in these updates (one microbatch each)."""
    global calls
    calls += policy_logp_BT.shape[1] > 3  # not the trial before the job
    loss_BT, metrics = negative_log_likelihood(policy_logp_BT, mask_BT=mask_BT)
    return loss_BT * (float("nan") if calls in steps else 1.0), metrics


def masked(roles, batches, cfg):
    """Nothing is left to train on in step 2."""
    from dataclasses import replace

    from aligner.algorithms import Step

    for number, batch in enumerate(batches, start=1):
        if number == 2:
            batch = replace(batch, mask_BT=torch.zeros_like(batch.mask_BT))
        yield Step(roles.policy.update(cfg.loss, roles.policy.scatter(batch)))
'''
SFT = [
    "algorithm=sft", "data=demonstrations", "data.eval_path=null", "train.save=true",
    "policy.micro_tokens=4096", "policy.optimizer.lr=1e-3", "train.steps=6",
]  # fmt: skip
NAN = "algorithm.loss._target_=own.nan_in"
Job = Callable[..., tuple[Any, Path]]


@pytest.fixture
def sft(torchrun: Callable[..., Any], task: Any, tmp_path: Path) -> Job:
    """sft(*overrides): a job of imitation on 2 ranks, and its folder."""
    (tmp_path / "own.py").write_text(OWN)

    def run(*overrides: str) -> tuple[Any, Path]:
        run_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        data = f"data.path={task.folder / 'demonstrations.jsonl'}"
        base = [override for override in task.overrides(run_dir) if not override.startswith("algorithm.")]
        done = torchrun(2, ["-m", "aligner.main", *base, *SFT, data, *overrides], seconds=100)
        return done, run_dir

    return run


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_bad_batches_are_passed_over(sft: Job) -> None:
    done, run_dir = sft(NAN, "+algorithm.loss.steps=[3,4]")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = metrics(run_dir)
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1.0, 1.0, None, None]
    assert [row.get("guard/not_finite") for row in rows] == [None, None, 1.0, 1.0, None, None]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert done.stdout.count("guards.not_finite: 1 optimizer step(s) left out") == 1, "said once, not in every step"
    assert not (run_dir / "offending").exists()


def test_weights_are_those_of_before(sft: Job) -> None:
    """Two good steps, then bad ones to the end: the model is that of two steps, to the last bit."""
    steps = "policy.optimizer.schedule=constant"
    done, run_dir = sft(NAN, "+algorithm.loss.steps=[3,4]", "train.steps=4", steps)
    other, other_dir = sft(NAN, "+algorithm.loss.steps=[]", "train.steps=2", steps)
    longer, longer_dir = sft(NAN, "+algorithm.loss.steps=[]", "train.steps=4", steps)
    for one in (done, other, longer):
        assert one.returncode == 0, one.stdout[-1500:] + one.stderr[-3000:]
    left, two, four = (
        load_file(folder / "model" / "model.safetensors") for folder in map(single, (run_dir, other_dir, longer_dir))
    )
    assert left.keys() == two.keys() and all(torch.equal(left[name], two[name]) for name in left)
    assert not all(torch.equal(two[name], four[name]) for name in two)


def single(run_dir: Path) -> Path:
    """The folder of a run whose model is joined into one file."""
    weights: dict[str, Any] = {}
    for file in (run_dir / "model").glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    from safetensors.torch import save_file

    save_file(weights, run_dir / "model" / "model.safetensors")
    return run_dir


def test_too_many_end_the_job_and_the_batch_is_kept(sft: Job) -> None:
    done, run_dir = sft(NAN, "+algorithm.loss.steps=[2,3,4,5,6]", "guards.not_finite.max_in_row=2")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("aligner: error")]
    assert len(said) == 1, done.stderr
    for words in (
        "the loss is nan at optimizer step 1 of policy (step 4 of the loop)",
        "guards.not_finite.max_in_row=2",
    ):
        assert words in said[0]
    assert [row.get("skipped_steps") for row in metrics(run_dir)] == [None, 1.0, 1.0], "the weights are as before"
    files = sorted(path.name for path in (run_dir / "offending" / "step_4").iterdir())
    assert files == ["rank_0.json", "rank_0.safetensors", "rank_1.json", "rank_1.safetensors"]
    samples, _ = load_offending(run_dir / "offending" / "step_4")
    assert samples.rows == 4 and samples.mask_BT.any(1).all()
    losses = [load_file(run_dir / "offending" / "step_4" / f"rank_{rank}.safetensors") for rank in range(2)]
    for tensors in losses:
        assert tensors["loss"].isnan().any() and tensors["readout"].isfinite().all()


def test_a_batch_without_a_trained_token_moves_nothing(sft: Job) -> None:
    done, run_dir = sft("algorithm._target_=own.masked", "algorithm.loss._target_=aligner.objective.losses.negative_log_likelihood",
                        "+algorithm.roles=[policy]", "train.steps=3")  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = metrics(run_dir)
    assert [row.get("empty_steps") for row in rows] == [None, 1.0, None]
    assert [row.get("guard/empty_batch") for row in rows] == [None, 1.0, None]
    assert rows[1]["tokens"] == 0.0 and "grad_norm" not in rows[1]


@pytest.mark.matrix
def test_a_guard_ends_every_rank_with_one_message(torchrun: Callable[..., Any], task: Any, tmp_path: Path) -> None:
    """A reward that is always 1: no advantage but 0, said at once, and the end after three steps."""
    run_dir = tmp_path / "run"
    overrides = [
        f"reward.rule='{task.folder / 'rule.py'}:fair'", "train.steps=9", "guards.zero_advantages.steps=1",
        "guards.stuck_reward.action=stop", "guards.stuck_reward.steps=2",
    ]  # fmt: skip
    done = torchrun(2, ["-m", "aligner.main", *task.overrides(run_dir), *overrides], seconds=200)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("aligner: error")]
    assert (
        len(said) == 1 and "guards.stuck_reward: the mean reward is 1.0, unchanged for 2 steps in a row" in said[0]
    ), done.stderr[-3000:]
    assert "guards.stuck_reward.action=stop" in said[0]
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3], "the step that ended it is logged"
    assert [row["advantage_abs_max"] for row in rows] == [0.0] * 3
    assert [row.get("guard/zero_advantages") for row in rows] == [1.0] * 3
    assert [row.get("guard/stuck_reward") for row in rows] == [None, None, 1.0]
    assert done.stdout.count("! guards.zero_advantages: every advantage is 0") == 1
    shutil.rmtree(run_dir)
