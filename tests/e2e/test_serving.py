"""A trained model served by vLLM's own server answers as transformers does, over HTTP; by the documented commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import Task
from tests.e2e.test_end_tokens import CLOSING, base_model

__all__ = ["base_model"]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400
"""A server starts in 50 s on 2 cores that have nothing else to do."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """serve(folder, *options): the address of a server that has been started by launch/serve.sh; it is ended after the test."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    binaries = Path(sys.executable).parent
    (checkout / "launch" / "environment.sh").write_text(
        f'export PATH="{binaries}:$PATH" ALIGNER_DEVICE=cpu HF_HUB_OFFLINE=1 '
        f'PYTHONPATH="{ROOT}" XDG_CACHE_HOME="{tmp_path}/cache"\n'
    )
    processes = []

    def start(folder: Path, *options: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["bash", str(checkout / "launch" / "serve.sh"), str(folder), "--port", str(port), *options]
        log = (tmp_path / "server.log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        processes.append(process)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    return address
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail((tmp_path / "server.log").read_text()[-4000:])

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def ask(address: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@pytest.mark.slow
def test_the_best_of_a_run_is_served(
    job: Callable[..., Any], serve: Callable[..., str], task: Task, tmp_path: Path
) -> None:
    job(2, "train.steps=2", "train.eval_every=1", "train.keep_best=true", "policy.optimizer.lr=3e-3", seconds=400)
    best = tmp_path / "run0" / "best"
    address = serve(best, "--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory-bytes", str(16 << 20))
    prompts = [json.loads(line)["prompt"] for line in (task.folder / "heldout.jsonl").read_text().splitlines()[:4]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        expected = greedy(model, tokens, 8)
        # as tokens: the server's tokenizer may add a second begin token to a text that has one
        reply = ask(address, model=str(best), prompt=tokens, max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
        choice = reply["choices"][0]
        assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(log_p(model, tokens, expected), abs=1e-4)


@pytest.mark.slow
def test_a_model_is_served_with_the_end_of_its_template(
    serve: Callable[..., str], base_model: Path, task: Task
) -> None:
    """Its generation_config.json names <eos> alone, and its chat template closes turns with ~."""
    closing = AutoTokenizer.from_pretrained(base_model).convert_tokens_to_ids(CLOSING)
    address = serve(base_model, "--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory-bytes", str(16 << 20))
    prompts = [json.loads(line)["prompt"] for line in (task.folder / "heldout.jsonl").read_text().splitlines()]
    reply = ask(address, model=str(base_model), prompt=prompts, n=8, max_tokens=40, temperature=1.0, seed=0)
    assert closing in {choice["stop_reason"] for choice in reply["choices"] if choice["finish_reason"] == "stop"}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def log_p(model: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return found
