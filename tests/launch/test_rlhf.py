"""launch/rlhf.sh: which stages it runs, what it hands from one to the next, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.config.schema import CONF
from tests.launch.conftest import Launch

STAGES = ["sft", "preferences", "reward_model", "ppo", "dpo", "grpo"]


def stages_of(launch: Launch) -> list[str]:
    return [word.removeprefix("stage=") for word in launch.commands() if word.startswith("stage=")]


def test_every_stage_in_order_with_the_overrides_and_a_tenth_of_the_pairs_held_out(
    launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "it's a run"
    done = launch.run("rlhf.sh", "--seed", "3", "--out", str(run), "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert stages_of(launch) == STAGES
    assert {path.stem for path in (CONF / "stage").glob("*.yaml")} == set(STAGES)
    commands = launch.commands()
    assert commands[:6] == ["python", "-m", "aligner.data.column_addition", "--out", f"{run}/task", "--seed"]
    assert commands.count("train.steps=2") == commands.count("seed=3") == len(STAGES)
    assert commands[-len(STAGES) :] == [f"{run}/{stage}" for stage in STAGES], "the summary is of every stage"
    assert (run / "preferences.jsonl").read_text().split() == [str(row) for row in range(36)]
    assert (run / "heldout_preferences.jsonl").read_text().split() == ["36", "37", "38", "39"]


def test_what_is_done_is_not_done_again(launch: Launch, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    launch.run("rlhf.sh", "--out", run, "--stages", "sft preferences")
    launch.record.unlink()
    done = launch.run("rlhf.sh", "--out", run, "--stages", "sft preferences dpo")
    assert done.returncode == 0, done.stderr
    assert stages_of(launch) == ["dpo"]
    assert "sft: done before" in done.stdout
    assert (tmp_path / "run" / "preferences.jsonl").read_text().count("\n") == 36, "not split a second time"


def test_a_task_and_preferences_of_one_s_own(launch: Launch, tmp_path: Path) -> None:
    task = tmp_path / "my task"
    (task / "model").mkdir(parents=True)
    for name in ("model/config.json", "demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl"):
        (task / name).write_text("{}\n")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(f"own {row}" for row in range(25)))  # no newline at the end, as some editors leave it
    run = tmp_path / "run"
    done = launch.run("rlhf.sh", "--out", str(run), "--task", str(task), "--preferences", str(rows))
    assert done.returncode == 0, done.stderr
    assert stages_of(launch) == [stage for stage in STAGES if stage != "preferences"]
    assert "aligner.data.column_addition" not in launch.commands()
    assert (run / "task" / "prompts.jsonl").read_text() == "{}\n"
    assert (run / "preferences.jsonl").read_text().splitlines() == [f"own {row}" for row in range(23)]
    assert (run / "heldout_preferences.jsonl").read_text().splitlines() == ["own 23", "own 24"]


def test_a_large_file_of_preferences_is_cut_too(launch: Launch, tmp_path: Path) -> None:
    """More than a pipe holds."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n\n".join(f"{row} {'x' * 200}" for row in range(5000)) + "\n")
    done = launch.run("rlhf.sh", "--out", str(tmp_path / "run"), "--preferences", str(rows), "--stages", "sft")
    assert done.returncode == 0, done.stderr
    training, held = (tmp_path / "run" / name for name in ("preferences.jsonl", "heldout_preferences.jsonl"))
    numbers = [[int(line.split()[0]) for line in file.read_text().splitlines()] for file in (training, held)]
    assert numbers == [list(range(4500)), list(range(4500, 5000))]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seed",), "--seed needs a value"),
        (("--seed", "x"), "--seed x is not a whole number"),
        (("--sed", "1"), "--sed is not known; see --help"),
        (("fast",), '"fast" is neither an option nor an override'),
        (("--stages", "sft pop"), "--stages: there is no conf/stage/pop.yaml"),
        (("--task", "/nowhere"), "--task /nowhere has no model/config.json"),
        (("--preferences", "/nowhere"), "--preferences /nowhere is not there, or empty"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_installed(
    launch: Launch, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = launch.run("rlhf.sh", "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not launch.record.exists() and not (tmp_path / "run").exists()


def test_too_few_pairs_end_the_pipeline(launch: Launch, tmp_path: Path) -> None:
    done = launch.run("rlhf.sh", "--out", str(tmp_path / "run"), RANKED="19")
    assert done.returncode == 2
    assert "has 19 preferences, too few" in done.stderr
    assert stages_of(launch) == ["sft", "preferences"]


def test_help_names_every_option(launch: Launch) -> None:
    done = launch.run("rlhf.sh", "--help")
    for option in ("--out", "--seed", "--task", "--preferences", "--stages", "KEY=VALUE"):
        assert option in done.stdout
