"""mode=check: what it says is worked by hand, mistakes end it with 2, it builds and writes nothing, and imports no engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from aligner.check.disk import bytes_needed, check_disk, nearest_folder
from aligner.check.memory import Machine, bytes_of_rank, check_memory, machine_of, roles_of_ranks
from aligner.checkpoint.config import CheckpointConfig
from aligner.config.check import CheckConfig
from aligner.config.schema import Config, compose_config, to_config
from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from aligner.data.prompts import Prompt
from aligner.main import main
from aligner.models.read_spec import read_spec
from aligner.models.stored import describe_training
from aligner.models.tensors import parameter_count
from aligner.run.prepare import prepare
from aligner.spmd.placement import make_meshes
from tests import fork_server
from tests.check.whole import said_of

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(folder, ColumnAddition(demonstrations=64, prompts=64, heldout=16, preferences=16), shape)
    return folder


def overrides(task: Path, *more: str) -> list[str]:
    return [
        f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}",
        f"data.eval_path={task / 'heldout.jsonl'}", f"run_dir={task / 'absent' / 'run'}", *more,
    ]  # fmt: skip


def config_of(task: Path, *more: str) -> Config:
    return to_config(compose_config(overrides(task, *more), "quickstart"))


def command(task: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--config-name=quickstart", *overrides(task, "mode=check", *more)]
    return fork_server.run(
        [sys.executable, "-m", "aligner.main", *arguments], cwd=ROOT, env={**os.environ, **env}, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip


def test_the_command(task: Path) -> None:
    done = command(task)
    assert done.returncode == 0, done.stderr
    assert "found nothing wrong: the job can start on 1 rank (check.ranks=N" in done.stdout
    for words in ("94.7k parameters", "64 rows (prompts); 32 a step, 30.0 passes; held out: 16 prompts", "60 steps"):
        assert words in done.stdout, done.stdout
    assert not (task / "absent").exists(), "it writes nothing"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["mode=chek"], "mode=chek is unknown; use train, check"),
        (["check.ranks=0"], "check.ranks=0 must be at least 1, or null"),
        (["placement=split"], "rank"),
        (["reward.rule=nowhere.rule"], "reward.rule='nowhere.rule': nowhere cannot be imported"),
        (
            ["data.curriculum.by=success", "algorithm.roles=[policy,rollout]", "train.eval_every=0"],
            "data.curriculum.by=success measures prompts by the rewards of their samples; add reward to algorithm.roles",
        ),
        (["guards.kl.action=panic"], "guards.kl.action=panic is unknown; use off, warn, stop"),
    ],
)
def test_mistakes_end_it_with_2(
    task: Path, more: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as end:
        main(["--config-name=quickstart", *overrides(task, "mode=check", *more)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("aligner: error: ") and said in err, err


def test_a_mistake_is_the_exit_status(task: Path) -> None:
    done = command(task, "train.steps=0")
    assert (done.returncode, done.stdout) == (2, "") and "train.steps=0 must be at least 1" in done.stderr


def test_under_torchrun_one_rank_speaks(task: Path, torchrun: Callable[..., Any]) -> None:
    done = torchrun(2, ["-m", "aligner.main", "--config-name=quickstart", *overrides(task, "mode=check")], seconds=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the job can start on 2 ranks") == 1


def test_no_engine_is_imported(task: Path) -> None:
    program = f"""
import sys
from aligner.main import main
main({["--config-name=quickstart", *overrides(task, "mode=check")]!r})
for algorithm in ("grpo", "ppo", "remax", "reinforce_pp", "sft", "dpo", "kto", "online_dpo", "reward_model"):
    __import__(f"aligner.algorithms.{{algorithm}}")
print(sorted({{"vllm", "megatron"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_job_of_other_ranks_than_here(task: Path) -> None:
    config = config_of(task, "mode=check", "placement=split", "check.ranks=64")
    said = said_of(prepare(config, 64), 64).splitlines()
    lines = {line.split()[0]: line for line in said[1:]}
    assert "ranks 0-31: data 32, learns" in lines["policy"]
    assert "ranks 32-63: data 32" in lines["rollout"] and "learns" not in lines["rollout"]
    assert said[0].endswith("the job can start on 64 ranks.")


def test_what_a_chat_template_does_not_write_is_said(task: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "1+2="}], "tools": [{"name": "sum"}], "answer": "3"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    config = config_of(task, "mode=check", f"data.path={tmp_path / 'rows.jsonl'}", "data.prompts_per_step=2")
    assert "; rows with 'tools' that the chat template does not render: 2\n" in said_of(prepare(config, 1), 1)


def test_sources_are_shown_with_their_shares_and_named_in_errors(task: Path, tmp_path: Path) -> None:
    """Weights 2 and 1 with the square roots of 4 and 16 rows: 4 : 4."""
    for name, count in (("a", 4), ("b", 16)):
        rows = [json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    a, b = (tmp_path / f"{name}.jsonl" for name in "ab")
    sources = ["data.path=null", f"data.sources={{a: {{path: {a}, weight: 2}}, b: {{path: {b}}}}}"]
    given = [*sources, "data.prompts_per_step=4", "data.mixture.temperature=2"]
    job = prepare(config_of(task, *given), 1)
    assert f"a 50.0% (4 rows of {a}), b 50.0% (16 rows of {b}): 20 rows (prompts); 4 a step" in said_of(job, 1)
    assert {"rows of data.sources.a.path", "rows of data.sources.b.path"} <= set(job.inputs)
    b.write_text(json.dumps({"prompt": "1+1="}))
    with pytest.raises(
        ValueError, match=rf"needs the field 'answer' .* 1 of the 1 rows of data\.sources\.b\.path={b} lack it"
    ):
        prepare(config_of(task, *given), 1)
    with pytest.raises(
        ValueError, match=r"data\.sources\.b\.format=gsm8k gives prompts, demonstrations, not data\.kind=feedback"
    ):
        prepare(config_of(task, *given, "data.sources.b.format=gsm8k", "data.kind=feedback", "algorithm=kto"), 1)


def test_a_template_file_is_used_for_the_rows_and_exported(task: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "1+2="}], "answer": "3"}))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<bos>{{ m.content }}{% endfor %}")
    rows = [f"data.path={tmp_path / 'rows.jsonl'}", "data.prompts_per_step=1", "policy.minibatches=1"]
    job = prepare(config_of(task, *rows, f"data.chat_template={template}"), 1)
    (prompt,) = job.checked.data.training
    assert isinstance(prompt, Prompt) and prompt.text == "<bos>1+2="
    assert "template of data.chat_template" in job.inputs
    for name, content in describe_training(job.checked.spec, "policy").items():
        (tmp_path / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template.read_text()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.skipif(not ON_CPU, reason="the machine's own GPU counts where none is said")
def test_machines(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    checking = config_of(task, "mode=check")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_of(checking, 16) == Machine(16, there, None)
    asked = replace(checking, check=CheckConfig(ranks=16, ranks_per_host=8, device_gib=80.0))
    assert machine_of(asked, 16) == Machine(8, there, 80 * 2**30)
    assert machine_of(replace(asked, mode="train"), 16) == Machine(1, there, None), "it is said for mode=check only"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine_of(replace(asked, mode="train"), 16).ranks == 4


def test_memory_by_hand(task: Path) -> None:
    """94,656 parameters and some: policy 4 + 4 + 8 bytes each (fp32, one shard), reference 4, engine 4 and its cache."""
    spec = read_spec(task / "model")
    n = parameter_count(spec)
    roles = ["policy", "rollout", "reference"]
    config = config_of(task, "residency.mode=off", "rollout.kv_cache_mib=1")
    meshes, specs = make_meshes(config.placement, 2), dict.fromkeys(roles, spec)
    held = {"policy": 16.0 * n, "rollout": 4.0 * n + 2**20, "reference": 4.0 * n}
    cpu, gpu = Machine(2, 10**9, None), Machine(2, 10**9, 10**9)
    assert bytes_of_rank(config, held, roles, cpu) == 24 * n + 2**20
    assert bytes_of_rank(config, held, roles, gpu) == 24 * n + 2**20
    moving = config_of(task, "residency.mode=auto", "residency.keep=[reference]")
    assert bytes_of_rank(moving, held, roles, gpu) == 4 * n + max(16 * n, 4 * n + 2**20)
    assert bytes_of_rank(moving, held, roles, cpu) == 24 * n + 2**20
    # two data shards: 4 + 4 + 8 / 2 bytes for the policy on each of two ranks
    exact = int(2 * ((4 + 4 + 4 + 4 + 4) * n + 2**20))
    copy = 12 * n  # of a checkpoint that is being written, over the ranks
    check_memory(config, specs, meshes, Machine(2, exact + copy, None))
    with pytest.raises(ValueError, match="the roles on this host need about"):
        check_memory(config, specs, meshes, Machine(2, exact + copy - 2, None))
    check_memory(replace(config, checkpoint=CheckpointConfig(every=0)), specs, meshes, Machine(2, exact, None))
    check_memory(config, specs, meshes, Machine(2, 1, exact / 2))
    with pytest.raises(ValueError, match=r"rank 0 needs at least .* its GPU has"):
        check_memory(config, specs, meshes, Machine(2, 1, exact / 2 - 1))
    greedy = config_of(task, "residency.mode=off", "rollout.kv_cache_mib=null", "rollout.gpu_memory_utilization=0.9")
    with pytest.raises(ValueError, match=r"rollout\.gpu_memory_utilization"):
        check_memory(greedy, specs, meshes, Machine(2, 1, 10.0 * n))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["residency.budget_gib=1"],
            r"residency\.mode=auto: roles hold .* of a rank's 1\.00 GiB, and stay where activations take",
        ),
        (
            ["residency.budget_gib=0.001"],
            r"residency\.mode=auto: roles hold .*, more than a rank's .*: some leave while others",
        ),
        (["residency.budget_gib=null"], r"residency\.mode=auto: roles hold .* and stay where activations take no more"),
    ],
)
def test_what_is_said_of_residency(task: Path, more: list[str], said: str) -> None:
    assert re.search(said, said_of(prepare(config_of(task, "mode=check", "rollout.kv_cache_mib=1", *more), 1), 1))


def test_no_budget_is_spoken_of_where_none_counts(task: Path) -> None:
    assert "residency" not in said_of(prepare(config_of(task, "mode=check", "residency.mode=off"), 1), 1)


def test_who_shares_a_rank(task: Path) -> None:
    config = config_of(task, "placement.policy.ranks=0-2", "placement.rollout.ranks=2-3")
    assert roles_of_ranks(make_meshes(config.placement, 4), ["policy", "rollout"]) == {
        ("policy",): 0, ("policy", "rollout"): 2, ("rollout",): 3,
    }  # fmt: skip


def test_disk_by_hand(task: Path) -> None:
    """The exported model has the bytes of the file that it was read from."""
    spec = read_spec(task / "model")
    specs = {"policy": spec, "reference": spec, "rollout": spec}
    need = bytes_needed(config_of(task), ["policy", "rollout", "reference", "reward"], specs, 2)
    file = (task / "model" / "model.safetensors").stat().st_size
    assert need["exported model"] == pytest.approx(file, rel=0.05)
    half = config_of(task, "policy.dtype=bfloat16", "train.report=false", "logging.samples_every=0")
    need = bytes_needed(half, ["policy", "rollout", "reference", "reward"], specs, 2)
    assert need["exported model"] == 2 * parameter_count(spec)
    assert need["checkpoints"] == 3 * 12 * parameter_count(spec), "two that stay, and a new one beside them"
    assert need.keys() == {"exported model", "checkpoints", "metrics", "timeline"}
    assert "checkpoints" not in bytes_needed(config_of(task, "checkpoint.every=0"), ["policy"], {"policy": spec}, 2)
    kept = bytes_needed(
        config_of(task, "train.steps=9", "train.export_every=2", "train.export_keep=1"), ["policy"], specs, 1
    )
    assert kept["exports"] == 2 * 4 * parameter_count(spec)
    none = config_of(task, "train.save=false")
    assert "exported model" not in bytes_needed(none, ["policy"], {"policy": spec}, 2)
    both = bytes_needed(config_of(task), ["policy", "critic"], {"policy": spec, "critic": spec}, 1)
    assert both["exported model"] == 8 * parameter_count(spec)


def test_too_little_room(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(task)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 3 << 30))
    check_disk(config, {"exported model": 2.0 * 2**30, "metrics": 2.0**30})
    with pytest.raises(
        ValueError, match=r"run_dir=.*3.00 GiB free.*about 4.00 GiB.*exported model 3.00 GiB, metrics 1.00"
    ):
        check_disk(config, {"metrics": 2.0**30, "exported model": 3.0 * 2**30})
    assert nearest_folder(task / "a" / "b") == task


@pytest.mark.matrix
def test_what_a_run_writes_was_foreseen(task: Path, torchrun: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    base = [
        "--config-name=quickstart_sft", f"model.path={task / 'model'}", f"data.path={task / 'demonstrations.jsonl'}", "data=demonstrations",
        "data.eval_path=null", f"run_dir={run_dir}", "train.steps=4", "train.eval_every=0", "data.prompts_per_step=4",
    ]  # fmt: skip
    config = to_config(compose_config(base[1:], "quickstart_sft"))
    need = bytes_needed(config, ["policy"], {"policy": read_spec(task / "model")}, 2)
    done = torchrun(2, ["-m", "aligner.main", *base], seconds=150)
    assert done.returncode == 0, done.stderr[-3000:]
    written = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    assert written <= sum(need.values()) + 2**20
    weights = sum(path.stat().st_size for path in (run_dir / "model").glob("*.safetensors"))
    assert weights == pytest.approx(need["exported model"], rel=0.05)
    assert (run_dir / "metrics.jsonl").stat().st_size <= need["metrics"]
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
