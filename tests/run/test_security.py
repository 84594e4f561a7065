"""No line of ours loads or runs what others wrote unasked: the tree is read, not trusted. And no secret leaves a job."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner.data.column_addition import ColumnAddition, ModelShape, write_task

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for folder in ("aligner", "tools", "docs", "launch") for file in (ROOT / folder).rglob("*.py"))
NAMES = {"torch", "pickle", "yaml", "numpy", "np", "os", "subprocess", "ssl", "marshal", "shelve", "tempfile"}
UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"}
UNPICKLING |= {
    f"{module}.{name}" for module in ("dill", "cloudpickle", "joblib", "_pickle") for name in ("load", "loads")
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNSAFE_YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"}
UNVERIFIED = {"ssl._create_unverified_context", "ssl.CERT_NONE", "tempfile.mktemp"}
BOXED = {(f"aligner/reward/sandboxed/{name}.py", "exec") for name in ("harness", "served")}
"""Programs of sandboxes: what a model wrote and what tests it."""
TRUSTED = {
    (f"aligner/{file}.py", "trust_remote_code=True")
    for file in (
        "models/transformers_model", "models/transformers_spec", "rollout/transformers/engine", "rollout/transformers/sizes",
        "trainer/fsdp/checks", "trainer/fsdp/model",
    )
} | {("tools/generate.py", "trust_remote_code=True")}  # fmt: skip
"""Pass model.trust_remote_code on, which is false unless a user sets it."""
ALLOWED = {("aligner/spmd/serialization.py", "pickle.loads"), *BOXED, *TRUSTED}
"""Besides, messages between the ranks of one job (docs/security.md)."""


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that must not stand in our code."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, imported)
            if name in UNPICKLING | SHELLS | UNSAFE_YAML | UNVERIFIED or name.startswith("pickle.Unpickler"):
                yield node.lineno, name
        if isinstance(node, ast.Call):
            yield from of_call(node, full_name(node.func, imported))
        if isinstance(node, ast.Assign) and any(getattr(t, "attr", "") == "check_hostname" for t in node.targets):
            yield node.lineno, "check_hostname"


def of_call(call: ast.Call, name: str) -> Iterator[tuple[int, str]]:
    given = {word.arg: word.value for word in call.keywords if word.arg}

    def says(word: str, value: object) -> bool:
        return isinstance(given.get(word), ast.Constant) and given[word].value is value  # type: ignore[attr-defined]

    if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
        yield call.lineno, name
    if name == "torch.load" and not says("weights_only", True):
        yield call.lineno, "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
        if "Safe" not in (getattr(loader, "attr", "") or getattr(loader, "id", "")):
            yield call.lineno, "yaml.load without a safe loader"
    for word, value in (("shell", True), ("allow_pickle", True), ("trust_remote_code", True)):
        if word in given and not says(word, not value):
            yield call.lineno, f"{word}={value}"
    # `execute(plan, ..., verify=False)` and `copy_weights` of the resharding are about checksums
    of_resharding = name.rpartition(".")[2] in ("execute", "copy_weights")
    if (says("verify", False) or says("verify_ssl", False)) and not of_resharding:
        yield call.lineno, "verify=False"


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([imported.get(node.id, node.id), *reversed(parts)])


def test_nothing_of_ours_is_forbidden() -> None:
    found = {
        (str(file.relative_to(ROOT)), what, line)
        for file in FILES
        for line, what in forbidden(file.read_text(encoding="utf-8"))
    }
    assert len(FILES) > 150
    assert {(file, what, line) for file, what, line in found if (file, what) not in ALLOWED} == set()
    assert {(file, what) for file, what, _ in found} == ALLOWED, "what is allowed is there; else take it off the list"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import torch\ntorch.load('x')", "torch.load without weights_only=True"),
        ("from torch import load\nload('x', weights_only=False)", "torch.load without weights_only=True"),
        ("import pickle as p\np.load(f)", "pickle.load"),
        ("from pickle import loads as read\nread(b'')", "pickle.loads"),
        ("import pickle\nclass A(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import yaml\nyaml.load(f)", "yaml.load without a safe loader"),
        ("import yaml\nyaml.load(f, Loader=yaml.Loader)", "yaml.load without a safe loader"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("exec(text)", "exec"),
        ("eval(text)", "eval"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.run('ls', shell=flag)", "shell=True"),
        ("import requests\nrequests.get(u, verify=False)", "verify=False"),
        ("import ssl\nc = ssl._create_unverified_context()", "ssl._create_unverified_context"),
        ("c.check_hostname = False", "check_hostname"),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", "trust_remote_code=True"),
    ],
)
def test_the_search_finds_it(source: str, what: str) -> None:
    assert what in [name for _, name in forbidden(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import yaml\nyaml.safe_load(f)\nyaml.load(f, Loader=yaml.CSafeLoader)",
        "model.eval()\nre.compile('x')",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import pickle\npickle.dumps(1)",
    ],
)
def test_the_search_leaves_alone(source: str) -> None:
    assert list(forbidden(source)) == []


OWN = '''
from aligner.algorithms import Step
from aligner.reward.worker import Unparsable


def scoring(roles, batches, cfg):
    """Rewards without an engine."""
    for batch in batches:
        rows = roles.policy.scatter(batch)
        roles.reward.score(rows)
        yield Step(roles.policy.update(cfg.loss, rows))


def fine(prompt, response, api_key="", **fields):
    return float(len(api_key) == 24)


def leaking(prompt, response, api_key="", **fields):
    raise RuntimeError(f"401: the key {api_key} is not known")
'''
CONFIGURED, ENVIRONMENT, URL = "configured-secret-value1", "environment-secret-value", "password-in-an-url"


@pytest.fixture
def job(torchrun: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """job(*overrides): a job with secrets in its configuration and environment; its folder is tmp_path/run."""
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(tmp_path / "task", ColumnAddition(demonstrations=64, prompts=8, heldout=8, preferences=8), shape)
    (tmp_path / "own.py").write_text(OWN)
    base = [
        "--config-name=quickstart_sft", f"model.path={tmp_path / 'task' / 'model'}", "algorithm._target_=own.scoring",
        f"data.path={tmp_path / 'task' / 'demonstrations.jsonl'}", "algorithm.roles=[policy,reward]", "data.eval_path=null",
        f"run_dir={tmp_path / 'run'}", "train.steps=2", "train.eval_every=0", "data.prompts_per_step=4",
        "train.report=true", f"+reward.kwargs.api_key={CONFIGURED}",
        f"+reward.kwargs.where='https://me:{URL}@host/'", f"+reward.kwargs.note='say {ENVIRONMENT}'",
    ]  # fmt: skip

    def run(*overrides: str) -> Any:
        env = {"SERVICE_API_KEY": ENVIRONMENT}
        return torchrun(2, ["-m", "aligner.main", *base, *overrides], seconds=150, env=env)

    return run


def leaks(done: Any, folder: Path) -> list[str]:
    """Where a secret stands: streams, and files by name."""
    found = [name for name in ("stdout", "stderr") for value in SECRETS if value in getattr(done, name)]
    for file in (path for path in folder.rglob("*") if path.is_file()):
        found += [str(file) for value in SECRETS if value.encode() in file.read_bytes()]
    return found


SECRETS = (CONFIGURED, ENVIRONMENT, URL)


def test_no_secret_in_what_a_run_leaves_behind(job: Callable[..., Any], tmp_path: Path) -> None:
    done = job("reward.rule=own.fine", "logging=wandb")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    run_dir = tmp_path / "run"
    saved = (run_dir / "config.yaml").read_text()
    assert "api_key: '***'" in saved and "https://***@host/" in saved and "note: say ***" in saved
    assert list(run_dir.glob("wandb/*/*.wandb")), "wandb has written"
    assert leaks(done, run_dir) == []


@pytest.mark.matrix
def test_no_secret_in_an_error(job: Callable[..., Any], tmp_path: Path) -> None:
    done = job("reward.rule=own.leaking")
    assert done.returncode != 0
    assert "401: the key *** is not known" in done.stderr, done.stderr[-3000:]
    assert leaks(done, tmp_path / "run") == []


@pytest.mark.parametrize("more", [["--cfg", "job"], ["data.path=nowhere"], ["train.stps=1"], ["mode=check"]])
def test_no_secret_before_a_job(more: list[str]) -> None:
    command = [sys.executable, "-m", "aligner.main", "model.path=x", "+reward.kwargs.api_key=" + CONFIGURED]
    command += [f"+reward.kwargs.where='https://me:{URL}@host/'", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout or done.stderr
    assert [value for value in SECRETS if value in done.stdout + done.stderr] == []
    if "--cfg" in more:
        assert "api_key: '***'" in done.stdout and "group_size: 8" in done.stdout


def test_a_bad_override_does_not_repeat_its_secret() -> None:
    command = [sys.executable, "-m", "aligner.main", f"reward.kwargs.token={CONFIGURED},{{", "model.path=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and CONFIGURED not in done.stderr, done.stderr
