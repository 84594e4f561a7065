"""A real pretrained model, SmolLM2-135M-Instruct: read, agreeing with transformers, answering, and trained for 3 steps.

`pytest -m pretrained`; the model's folder is ALIGNER_SMOLLM2, or tools/smollm2.py makes one (a download of 93 MB).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytestmark = pytest.mark.pretrained
ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
TALKS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Name three primary colors.",
        "The three primary colors are red, blue, and yellow. All other colors are mixed from them.",
    ),
    ("Write a haiku about autumn.", "Leaves drift to the ground,\nA quiet wind in the trees:\nSummer's last whisper."),
    ("def f(n):", "    return n * f(n - 1) if n > 1 else 1  # 5! = 120"),
    ("¿Qué hora es?", "Son las 12:45."),
)
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Germany?": "Berlin",
    "What is the color of the sky on a clear day?": "blue",
    "How many days are there in a week?": "7 days",
}
ANSWER_TOKENS = 24
# Measured on a CPU, against float64: logits (the largest is 43) within 1.6e-4, where transformers in float32 comes within 0.9e-4, or
# 1.6e-4 with matrix products by oneDNN.
LOGITS, LOGP = 3e-4, 1e-4

PARITY = """
import json, sys, torch
from pathlib import Path
from transformers import AutoTokenizer
from aligner.data.prompts import tokenize_prompts
from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.trainer.config import PolicyConfig
from aligner.trainer.output_layer import PackedOutput
from aligner.trainer.policy import Policy, Reference
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.role import Rollout
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World

folder, out = sys.argv[1], Path(sys.argv[2])
world, spec, config = World(200), read_spec(folder), PolicyConfig(micro_tokens=100, share_prefix="off")
expected = torch.load(out / "expected.pt")
lengths = expected["length_B"].tolist()
rows = len(lengths)
samples = Samples(
    expected["tokens_BT"], torch.ones(rows, dtype=torch.long), expected["length_B"], expected["mask_BT"],
    torch.arange(rows), [{} for _ in range(rows)], torch.zeros(expected["tokens_BT"].shape),
)
inner, caught = PackedOutput.logprobs_and_entropy, []
def catching(output, *rest, **named):
    caught.append(output.output_KX @ output.weight_VH.T)
    return inner(output, *rest, **named)
PackedOutput.logprobs_and_entropy = catching
tp1 = Reference("tp1", world, Mesh((0,), 1, 1), spec, config)
pp2 = Policy("pp2", world, Mesh((0, 1), 1, 2), spec, config, syncs=WeightSyncs())
for role in (tp1, pp2):
    caught.clear()
    logp_BT = role.logprobs(role.scatter(samples, 1)).gather()
    off = (logp_BT - expected["logp_BT"]).abs().max().item()
    if caught:
        order = [row for batch in role.microbatches(role.context_tree(samples), config.micro_tokens) for row in batch]
        logits = torch.cat(caught)
        wanted = torch.cat([expected["logits"][row] for row in order])
        found = {"layout": role.name, "logp": off, "logits": (logits[:, :spec.vocab] - wanted).abs().max().item(),
                 "largest": wanted.abs().max().item()}
        (out / f"{role.name}.json").write_text(json.dumps(found))

questions = [(asked, {"messages": [{"role": "user", "content": asked}]}) for asked in expected["answers"]]
prompts = tokenize_prompts(questions, AutoTokenizer.from_pretrained(folder), 80)
greedy = Sampling(temperature=0.0, max_tokens=int(sys.argv[3]))
rollout = Rollout("rollout", world, Mesh((0, 1), 1, 1), spec, RolloutConfig(max_model_len=128, max_num_seqs=8), greedy, 0)
pp2.reshard_to(rollout)
answers = rollout.generate(prompts).gather()
if world.rank == 0:
    (out / "answers.json").write_text(json.dumps([answers.response_tokens(row) for row in range(answers.rows)]))
world.leave()
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    given = os.environ.get("ALIGNER_SMOLLM2")
    if given:
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    tool = [sys.executable, str(ROOT / "tools" / "smollm2.py"), str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@contextmanager
def memory_of_children() -> Iterator[list[int]]:
    """[most bytes that this process's descendants held at one time]; pages they share count for each of them."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def write_expected(folder: Path, out: Path) -> tuple[Any, dict[str, list[int]]]:
    """Transformers' logits and log-probabilities of `TALKS` in float64, for the ranks to compare.

    Returns:
        (tokenizer, transformers' own answers to `QUESTIONS`).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in TALKS]
    rows = [torch.tensor(tokenizer.encode(tokenizer.apply_chat_template(talk, tokenize=False))) for talk in talks]
    length_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logp_BT = torch.zeros(tokens_BT.shape, dtype=torch.float64)
    answers = {}
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = reference.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers[question] = said[0, asked["input_ids"].shape[1] :].tolist()
    exact = reference.double()
    with torch.no_grad():
        logits = [exact(row[None]).logits[0] for row in rows]
    for i, (row, logits_TV) in enumerate(zip(rows, logits, strict=True)):
        logp_BT[i, 1 : len(row)] = logits_TV[:-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    place_T = torch.arange(tokens_BT.shape[1])
    mask_BT = (place_T > 0) & (place_T < length_B[:, None])
    expected = {"tokens_BT": tokens_BT, "length_B": length_B, "mask_BT": mask_BT, "logp_BT": logp_BT, "logits": logits}
    torch.save({**expected, "answers": answers}, out / "expected.pt")
    return tokenizer, answers


def test_tp1_and_pp2_agree_with_transformers_and_the_rollout_answers(
    torchrun: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    tokenizer, expected = write_expected(model, tmp_path)
    (tmp_path / "parity.py").write_text(PARITY)
    program = [str(tmp_path / "parity.py"), str(model), str(tmp_path), str(ANSWER_TOKENS)]
    done = torchrun(2, program, seconds=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    for layout in ("tp1", "pp2"):
        found = json.loads((tmp_path / f"{layout}.json").read_text())
        print(found)
        assert found["logp"] < LOGP and found["logits"] < LOGITS, found
    answers = json.loads((tmp_path / "answers.json").read_text())
    for (question, word), tokens in zip(QUESTIONS.items(), answers, strict=True):
        said = tokenizer.decode(tokens)
        print(question, repr(said))
        assert word in said, f"{question} {said}"
        assert tokens == expected[question], f"transformers says {tokenizer.decode(expected[question])!r}, not {said!r}"


def test_three_grpo_steps(torchrun: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    """Sums of two digits; the last number that the answer names must be the sum."""
    sums = [(a, b) for a in range(2, 8) for b in range(1, 5)]
    rows = [
        {
            "messages": [{"role": "user", "content": f"What is {a} + {b}? Answer with a number."}],
            "pattern": rf"(.*\D)?{a + b}\D*",
        }
        for a, b in sums
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = [
        "-m",
        "aligner.main",
        "--config-name=smollm2",
        f"model.path={model}",
        f"data.path={tmp_path / 'prompts.jsonl'}",
        f"run_dir={tmp_path / 'run'}",
        "train.steps=3",
        "train.save=false",
        "train.report=false",
    ]
    with memory_of_children() as peak:
        done = torchrun(2, program, seconds=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    print(f"peak {peak[0] / GIB:.1f} GiB")
    for step in steps:
        print({name: round(value, 6) for name, value in step.items() if name.startswith(("seconds", "gap", "reward"))})
        assert step["gap_max"] < 1e-3
        assert step["reward_ok"] == 32  # 8 prompts x 4 samples
        assert 0 < step["reward"] < 1 and step["grad_norm"] > 0  # sums that it gets right at times: something to learn
    assert peak[0] < 24 * GIB
