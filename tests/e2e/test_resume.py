"""A run that goes on from a checkpoint: in the same layout bit for bit, in any other one to rounding.

Each run is whole once; its checkpoint of step 3 then goes into an empty folder, from which another job takes 5 more steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Task
from tools.bench import kill
from tools.convert import main as convert

COMMON = ["train.steps=8", "checkpoint.every=3", "checkpoint.keep=9", "policy.optimizer.lr=1e-4"]
# The entropy term keeps the loss away from 0, where advantages cancel and a relative error says nothing.
GRPO = ["algorithm=grpo", "algorithm.group_size=4", "algorithm.loss.kl_coef=0.05", "algorithm.loss.entropy_coef=0.05"]
RUNS: dict[str, list[str]] = {
    "grpo": [*GRPO, "train.eval_every=2"],
    "distributed_bf16": [
        *GRPO,
        "policy.minibatches=2",
        "policy.dtype=bfloat16",
        "policy.optimizer.distributed=true",
        "policy.optimizer.schedule=cosine",
    ],
    "ppo": [
        "algorithm=ppo",
        "algorithm.group_size=4",
        "algorithm.scale_rewards=true",
        "algorithm.kl_control._target_=aligner.objective.kl_control.AdaptiveKL",
        "algorithm.kl_control.initial=0.1",
        "+algorithm.kl_control.target=0.01",
        "+algorithm.kl_control.rate=0.5",
        "algorithm.critic_warmup=1",
        "critic.optimizer.lr=1e-3",
    ],
    "two_ahead": ["algorithm=grpo_decoupled", "algorithm.group_size=4", "stream.lag=2"],
    "carried_over": ["algorithm=grpo_decoupled", "algorithm.group_size=4", "stream.lag=1", "stream.step_tokens=7"],
    "episodes": [*kill.play(Path("{task}")), "algorithm.group_size=4"],  # some are open at the checkpoint
    "mixture": [
        *GRPO,
        "train.eval_every=2",
        "reward.rule='{task}/rule.py:brief'",
        "data.path=null",
        "data.sources.few.path={task}/few.jsonl",
        "data.sources.few.weight=2",
        "data.sources.more.path={task}/more.jsonl",
        "data.sources.most.path={task}/prompts.jsonl",
        "data.curriculum.by=success",
        "data.curriculum.order=uncertain",
        "data.curriculum.retire_at=0.25",
    ],
    "dpo": [
        "algorithm=dpo",
        "data=preferences",
        "data.path={task}/preferences.jsonl",
        "data.eval_path=null",
        "data.streaming=true",
        "data.max_tokens=64",
        "data.prompts_per_step=24",  # the second epoch begins in the third step
        "policy.optimizer.lr=1e-3",
    ],
}
RUNS["fsdp"] = [*RUNS["grpo"], "policy.engine=fsdp", "policy.minibatches=2", "policy.optimizer.schedule=cosine"]
RUNS["fsdp_bf16"] = [*RUNS["fsdp"], "policy.dtype=bfloat16", "policy.recompute=full"]
WIDER = ("distributed_bf16", "two_ahead", "carried_over", "fsdp_bf16")
"""Run with -m matrix."""
LAYOUTS: dict[str, list[str]] = {
    "tp2": ["placement.policy.tensor=2", "placement.rollout.tensor=2", "placement.policy.sequence_parallel=true"],
    "pp2": ["placement.policy.pipeline=2"],
    "split": ["placement=split"],
    "distributed": ["policy.optimizer.distributed=true", "checkpoint.accept_changes=true"],
    "on_fsdp": ["policy.engine=fsdp", "checkpoint.accept_changes=true"],
}
TIMED = (*kill.TIMES, "data/wait_seconds")
NEAR_ZERO = ("gap", "gap_max", "imbalance", "padding", "shared_prefix", "idle")
"""Rounding itself, or the deal of the rows."""
Jobs = Callable[[int, Mapping[str, Sequence[str]]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture
def jobs(folder: Path, task: Task, torchrun: Callable[..., Any]) -> Jobs:
    """jobs(ranks, {folder: overrides}) runs the jobs one after the other."""

    def task_of(run_dir: Path, overrides: Sequence[str]) -> list[str]:
        samples = "algorithm=dpo" not in overrides
        return [one for one in task.overrides(run_dir)[1:] if samples or "group_size" not in one]

    for name, count in (("few", 4), ("more", 7)):
        lines = (task.folder / "prompts.jsonl").read_text().splitlines(keepends=True)
        (task.folder / f"{name}.jsonl").write_text("".join(lines[-count:]))
    (task.folder / "game.py").write_text(kill.GAME)
    (task.folder / "template.jinja").write_text(kill.TEMPLATE)

    def run(ranks: int, wanted: Mapping[str, Sequence[str]]) -> None:
        lists = [
            [*task_of(folder / name, overrides), *COMMON, *(one.format(task=task.folder) for one in overrides)]
            for name, overrides in wanted.items()
        ]
        file = folder / "jobs.json"
        file.write_text(json.dumps(lists))
        done = torchrun(ranks, ["-m", "tests.e2e.jobs", str(file)], seconds=400)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]

    return run


def continued(folder: Path, source: str, name: str) -> str:
    """A folder with the checkpoint of step 3 of a run."""
    to = folder / name / "checkpoints" / "step-00000003"
    shutil.copytree(folder / source / "checkpoints" / "step-00000003", to)
    return name


def rows_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows}


def last_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000008"


def assert_close(run_dir: Path, whole: Path, tolerance: float = 1e-5) -> None:
    """The 5 steps after step 3 have the metrics of the run in one go."""
    found, expected = rows_of(run_dir), rows_of(whole)
    assert sorted(found) == [4, 5, 6, 7, 8]
    for step, row in found.items():
        for name in row.keys() - {*NEAR_ZERO, "step"}:
            assert row[name] == pytest.approx(expected[step][name], rel=tolerance, abs=tolerance), (
                f"{name} of step {step}"
            )


def data_of(run_dir: Path) -> dict[str, Any]:
    """The position in the data, and what was measured of prompts, after step 8."""
    state: dict[str, Any] = json.loads((last_of(run_dir) / "state.json").read_text())["data"]
    return state


def assert_mixed(run_dir: Path) -> None:
    """Rows came from all sources; prompts were measured by their samples of training alone, and some are solved."""
    data, rows = data_of(run_dir), rows_of(run_dir)
    assert data["draws"] == 32 and set(data["sources"]) == {"few", "more", "most"}
    taken = {name: state["position"] for name, state in data["sources"].items()}
    for name, count in taken.items():
        shares = [row.get(f"source/{name}_share", 0.0) for row in rows.values()]
        assert sum(shares) * 4 == pytest.approx(count)
    assert sum(taken.values()) == 32 and data["sources"]["few"]["epoch"] > 0, "the smallest source is in another epoch"
    measured = [counts for state in data["sources"].values() for counts in state["measured"].values()]
    assert len(measured) == rows[8]["curriculum/measured"] and all(4 <= samples <= 12 for _, samples in measured)
    solved = sum(successes / samples >= 0.25 for successes, samples in measured)
    assert solved == rows[8]["curriculum/retired"] and 0 < solved < len(measured)
    for step, row in rows.items():
        if step:
            shares = {name: row[f"source/{name}_share"] for name in taken if row[f"source/{name}_share"]}
            assert row["reward"] == pytest.approx(sum(share * row[f"source/{n}_reward"] for n, share in shares.items()))


def open_episodes(run_dir: Path) -> int:
    """Episodes with a turn behind them that had not ended at the checkpoint of step 3."""
    state = json.loads((run_dir / "checkpoints" / "step-00000003" / "state.json").read_text())
    groups = state["engines"]["rollout"]["streams"][0]["groups"]
    return sum(len(one["turns"]) > 1 and one["end"] is None for _, group in groups for one in group["samples"])


@pytest.fixture(scope="module")
def whole() -> set[str]:
    """The runs that were made in one go."""
    return set()


def make(whole: set[str], jobs: Jobs, ranks: int, wanted: Mapping[str, Sequence[str]]) -> None:
    missing = {name: overrides for name, overrides in wanted.items() if name not in whole}
    if missing:
        jobs(ranks, missing)
        whole.update(missing)


@pytest.mark.parametrize(
    "names", [("grpo", "ppo", "dpo", "mixture", "episodes"), ("fsdp",), pytest.param(WIDER, marks=pytest.mark.matrix)]
)
def test_the_same_layout_goes_on_bit_for_bit(names: Sequence[str], folder: Path, jobs: Jobs, whole: set[str]) -> None:
    make(whole, jobs, 2, {name: RUNS[name] for name in names})
    jobs(2, {continued(folder, name, f"{name}_again"): RUNS[name] for name in names})
    for name in names:
        one, other = folder / name, folder / f"{name}_again"
        first, second = rows_of(one), rows_of(other)
        assert sorted(second) == [4, 5, 6, 7, 8]
        assert all(first[step] == row for step, row in second.items()), name
        for file in sorted(path for path in last_of(one).iterdir() if path.is_file()):
            twin = last_of(other) / file.name
            if file.suffix == ".safetensors":
                a, b = load_file(file), load_file(twin)
                assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), (name, file.name)
            elif file.name != "manifest.json":
                a, b = (json.loads(path.read_text()) for path in (file, twin))
                a.pop("config", None), b.pop("config", None)
                assert a == b, (name, file.name)
    if "ppo" not in names:
        return
    assert_mixed(folder / "mixture")
    assert open_episodes(folder / "episodes"), "none is replayed"
    critic = [key for key in load_file(last_of(folder / "ppo") / "rank-00000.safetensors") if key.startswith("critic/")]
    assert critic, "the critic is no part of it"


def test_another_layout_goes_on_to_rounding(folder: Path, jobs: Jobs, whole: set[str]) -> None:
    make(whole, jobs, 2, {"grpo": RUNS["grpo"], "mixture": RUNS["mixture"]})
    wanted = {continued(folder, "grpo", name): [*RUNS["grpo"], *layout] for name, layout in LAYOUTS.items()}
    wanted[continued(folder, "mixture", "mixture_tp2")] = [*RUNS["mixture"], *LAYOUTS["tp2"]]
    jobs(2, wanted)
    for name in LAYOUTS:
        assert_close(folder / name, folder / "grpo")
    assert_close(folder / "mixture_tp2", folder / "mixture")
    assert data_of(folder / "mixture_tp2") == data_of(folder / "mixture"), "what was drawn and measured"


@pytest.mark.matrix
def test_from_tensor_to_pipeline_parallel(folder: Path, jobs: Jobs) -> None:
    tensor, pipeline = ([*RUNS["ppo"], f"placement.policy.{axis}=2"] for axis in ("tensor", "pipeline"))
    jobs(2, {"ppo_tp2": tensor})
    jobs(2, {continued(folder, "ppo_tp2", "ppo_pp2"): pipeline})
    assert_close(folder / "ppo_pp2", folder / "ppo_tp2")


@pytest.mark.matrix
def test_from_one_rank_to_four(folder: Path, jobs: Jobs) -> None:
    jobs(1, {"one": RUNS["grpo"]})
    layout = ["placement.policy.tensor=2", "placement.policy.pipeline=2", "placement.rollout.tensor=2"]
    jobs(4, {continued(folder, "one", "four"): [*RUNS["grpo"], *layout]})
    assert_close(folder / "four", folder / "one")


@pytest.mark.matrix
def test_fsdp_from_two_ranks_to_one_and_to_four(folder: Path, jobs: Jobs, whole: set[str]) -> None:
    make(whole, jobs, 2, {"fsdp": RUNS["fsdp"]})
    jobs(1, {continued(folder, "fsdp", "fsdp_one"): RUNS["fsdp"]})
    replicas = ["placement.policy.replicas=2", "policy.reshard_after_forward=false", "checkpoint.accept_changes=true"]
    jobs(4, {continued(folder, "fsdp", "fsdp_four"): [*RUNS["fsdp"], *replicas]})
    for name in ("fsdp_one", "fsdp_four"):
        assert_close(folder / name, folder / "fsdp")


@pytest.mark.matrix
def test_a_training_checkpoint_becomes_a_model(folder: Path, task: Task, jobs: Jobs) -> None:
    layout = ["placement.policy.tensor=2", "policy.optimizer.distributed=true", "train.save=true"]
    jobs(2, {"exported": [*RUNS["grpo"], *layout]})
    convert([str(last_of(folder / "exported") / "policy"), str(folder / "converted")])
    found, expected = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (folder / "converted", folder / "exported" / "model")
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert (folder / "converted" / "tokenizer.json").read_bytes() == (
        task.folder / "model" / "tokenizer.json"
    ).read_bytes()
