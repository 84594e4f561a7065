"""tools/generate.py: answers as transformers computes them, the same file after any number of kills, and clear errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.data.chat import ChatOptions
from aligner.data.prompts import tokenize_prompts
from aligner.rollout.offline import fingerprint, take_devices
from aligner.rollout.requests import Sample
from tests import fork_server
from tests.data.tokenizer_kinds import tokenizer_of
from tests.e2e.conftest import Task, task
from tests.tools.generate_forks import ROOT, SETTINGS, tool

__all__ = ["task"]

ROWS = 30
FORKS = Path(__file__).with_name("generate_forks.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, rows.jsonl, and what the commands of generate_forks.py have written."""
    folder = tmp_path_factory.mktemp("generate")
    shutil.copytree(task.folder / "model", folder / "model")
    with (task.folder / "prompts.jsonl").open() as source:
        rows = [json.loads(next(source)) for _ in range(ROWS)]
    text = [json.dumps(row | {"question": row["prompt"].removeprefix("<bos>")}) for row in rows]
    (folder / "rows.jsonl").write_text("\n\n".join(text))  # blank lines are no rows
    done = fork_server.run(
        [sys.executable, str(FORKS), str(folder)], capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_command_ends_well(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert set(report["statuses"].values()) == {0}, (report, (folder / "chat.jsonl.log").read_text())


@pytest.mark.matrix
def test_kills_at_random_moments_change_nothing(folder: Path) -> None:
    kills = json.loads((folder / "report.json").read_text())["kills"]
    size = (folder / "whole.jsonl").stat().st_size
    assert len({written for written in kills if 0 < written < size}) >= 2, (
        f"none of the kills was in the middle: {kills}"
    )
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert not list(folder.glob("*.part-*"))
    assert "rows were answered before" in (folder / "killed.jsonl.log").read_text()


def test_a_line_has_what_the_help_says(folder: Path) -> None:
    found, rows = (
        lines(folder / "whole.jsonl"),
        [json.loads(t) for t in (folder / "rows.jsonl").read_text().split("\n\n")],
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    end = tokenizer.eos_token_id
    assert [line["index"] for line in found] == list(range(ROWS)) and [line["row"] for line in found] == rows
    assert len({line["key"] for line in found}) == ROWS
    finishes = set()
    for line in found:
        assert line["prompt"] == line["row"]["prompt"]
        for text, finish, count, tokens, logp in zip(
            line["response"], line["finish"], line["tokens"], line["token_ids"], line["logprobs"], strict=True
        ):
            assert text == tokenizer.decode(tokens, skip_special_tokens=True)
            assert len(tokens) == len(logp) == count <= 16
            assert finish == ("stop" if tokens[-1] == end else "length") and end not in tokens[:-1]
            assert finish == "stop" or count == 16
            finishes.add(finish)
    assert finishes == {"stop", "length"}
    assert sum(len(set(line["response"])) > 1 for line in found) > ROWS / 2, "samples of a row differ"
    again = lines(folder / "again.jsonl")
    assert sum(a["response"] != b["response"] for a, b in zip(found, again, strict=True)) > ROWS / 2, "--seed"


@torch.no_grad()
@pytest.mark.parametrize("name", ["whole", "greedy", "transformers", "greedy_transformers"])
def test_transformers_gives_the_same_log_probabilities(folder: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for line in lines(folder / f"{name}.jsonl"):
        prompt = tokenizer.encode(line["prompt"], add_special_tokens=False)
        for tokens, logp in zip(line["token_ids"], line["logprobs"], strict=True):
            logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            expected_T = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert torch.allclose(expected_T, torch.tensor(logp), atol=1e-4)
            if name.startswith("greedy"):
                likeliest_T = torch.log_softmax(logits_TV, -1).max(-1).values
                assert torch.allclose(likeliest_T, expected_T, atol=1e-4), "not the likeliest token"


def test_chat_system_and_field(folder: Path) -> None:
    """The template of this tokenizer writes a begin token and the messages' contents."""
    for line in lines(folder / "chat.jsonl"):
        assert line["prompt"] == f"<bos>Add: {line['row']['question']}"
        assert "logprobs" not in line and "token_ids" not in line


@pytest.mark.slow
def test_the_command_is_killed_and_two_engines_go_on(folder: Path, tmp_path: Path) -> None:
    """Other processes, and another number of them: the same file to the last byte."""
    out = tmp_path / "out.jsonl"
    command = [str(ROOT / "tools" / "generate.py"), "--model", str(folder / "model"), *SETTINGS, "--num-samples", "2",
               "--input", str(folder / "rows.jsonl"), "--output", str(out), "--logprobs", "--kv-cache-mib", "16"]  # fmt: skip
    process = fork_server.Popen([sys.executable, *command], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "out.jsonl.part-0", time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was not killed in the middle"
    assert part.stat().st_size and not out.exists()
    done = fork_server.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        capture_output=True, text=True, timeout=200, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert "rows were answered before" in done.stderr and "tokens/s" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


class Company:
    """An engine at its worst: each answer depends on everything that is asked with it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def answers(self, prompts: list[Any], seeds: list[int], sampling: Any, num_samples: int) -> list[list[Sample]]:
        digest = zlib.crc32(repr((prompts, seeds)).encode())
        tokens = [digest // 60**place % 60 + 3 for place in range(5)]
        return [[Sample([], 0, tokens, [0.0] * 5, ended=True)] * num_samples for _ in prompts]


@pytest.mark.matrix
def test_a_batch_keeps_its_company(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lines there were, and however many processes share the batches, which run one after the other here."""
    module = tool()
    monkeypatch.setattr(module, "make_engine", Company)
    (tmp_path / "rows.jsonl").write_text("\n".join((task.folder / "prompts.jsonl").read_text().splitlines()[:11]))

    def run(name: str, processes: int = 1) -> bytes:
        out = tmp_path / name
        command = ["--model", task.folder / "model", "--input", tmp_path / "rows.jsonl", "--output", out, *SETTINGS]
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            assert module.main([str(argument) for argument in command]) == 0
            assert out.exists() == (rank == processes - 1)
        return out.read_bytes()

    whole = run("whole")
    assert len({tuple(line["response"]) for line in lines(tmp_path / "whole")}) == 4, "batches of 3 rows: 3, 3, 3, 2"
    for kept in range(11):
        (tmp_path / f"kept{kept}.part-0").write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
        shutil.copy(tmp_path / "whole.settings.json", tmp_path / f"kept{kept}.settings.json")
        assert run(f"kept{kept}", processes=kept % 3 + 1) == whole, kept


GOOD = '{"prompt": "1+1="}\n'


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (GOOD + "{\n", [], "rows.jsonl:2 is not valid JSON"),
        (GOOD + "\n" + '{"text": "a"}\n', [], "rows.jsonl:3: a row needs 'prompt' or 'messages'"),
        (GOOD + '{"prompt": 3}\n', [], "rows.jsonl:2: 'prompt' must be text, not int"),
        (GOOD + '{"prompt": 3}\n', ["--chat"], "rows.jsonl:2: 'prompt' must be text, not int"),
        ("", [], "--input={tmp}/rows.jsonl has no rows"),
        (GOOD, ["--prompt-field", "question"], "rows.jsonl:1: the row has no 'question' (--prompt-field)"),
        (GOOD, ["--system", "Hi"], "rows.jsonl:1: --system needs a conversation; add --chat"),
        (
            '{"messages": [{"role": "user", "content": "1"}]}\n',
            ["--raw"],
            "rows.jsonl:1: the row has messages, but --raw",
        ),
        (GOOD, ["--chat-template", "{tmp}/none.jinja"], "--chat-template={tmp}/none.jinja is not a file; give a chat"),
        (
            GOOD,
            ["--max-tokens", "4000"],
            "rows.jsonl:1: the prompt has 4 tokens, which with --max-tokens 4000 is more than",
        ),
        (GOOD, ["--max-model-len", "16"], "is more than --max-model-len 16; use a smaller --max-tokens"),
        (GOOD, ["--temperature", "3"], "--temperature 3.0 must be between 0 and 2."),
        (GOOD, ["--top-p", "0"], "--top-p 0.0 must be more than 0 and at most 1."),
        (GOOD, ["--temperature", "0", "--num-samples", "2"], "--temperature 0 gives the same answer every time"),
        (
            GOOD,
            ["--chat-template-kwargs", '{"x": 1}'],
            "--chat-template-kwargs: x is not a variable of the tokenizer's",
        ),
        (GOOD, ["--batch", "0"], "--batch 0 must be at least 1."),
        (GOOD, ["--model", "{tmp}"], "{tmp} has no config.json"),
        (GOOD, ["--output", "{tmp}/none/out.jsonl"], "the folder {tmp}/none does not exist; create it first"),
    ],
)
def test_mistakes_are_named(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, more: list[str], said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    paths = [
        "--model",
        str(task.folder / "model"),
        "--input",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "o"),
    ]
    status = tool().main([*paths, *SETTINGS, *(text.replace("{tmp}", str(tmp_path)) for text in more)])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and said.format(tmp=tmp_path) in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing is begun"


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASK = {"role": "user", "content": "Rain?"}


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"messages": [ASK]}, []),
        ({"messages": [ASK]}, ["--system", "Be brief."]),
        ({"messages": [{"role": "system", "content": "Rhyme."}, ASK]}, ["--system", "Be brief."]),
        ({"prompt": "Rain?"}, ["--chat"]),
        ({"question": "Rain?", "prompt": "no"}, ["--chat", "--prompt-field", "question"]),
        ({"talk": [ASK], "messages": 3}, ["--prompt-field", "talk", "--system", "Be brief."]),
    ],
)
@pytest.mark.parametrize("thinks", [None, True])
def test_tools_and_variables_reach_the_template(row: dict[str, Any], more: list[str], thinks: bool | None) -> None:
    tokenizer = tokenizer_of("byte_level", "tools")
    tokenizer.chat_template = "{% if think is false %}NO{% endif %}" + str(tokenizer.chat_template)
    own = {} if thinks is None else {"chat_template_kwargs": {"think": thinks}}
    options = ["--model", "x", "--input", "x", "--output", "x", "--chat-template-kwargs", '{"think": false}']
    given = tool().options().parse_args([*options, *more])
    system = [{"role": "system", "content": "Be brief."}] * ("--system" in more)
    wanted = tokenizer.apply_chat_template(
        [*system, ASK], tools=TOOLS, think=bool(thinks), tokenize=False, add_generation_prompt=True
    )
    asked = tool().to_prompt_row({**row, "tools": TOOLS, **own}, "r:1", given)
    chat = ChatOptions(given.chat_template_kwargs, given.system)
    (prompt,) = tokenize_prompts([("r:1", asked)], tokenizer, 999, chat=chat)
    assert prompt.text == wanted and "weather" in wanted and wanted.startswith("NO") == (thinks is None)


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "Rain?"}, []),
        ({"prompt": "Rain?"}, ["--chat"]),
        ({"question": "Rain?", "prompt": "no"}, ["--chat", "--prompt-field", "question"]),
        ({"talk": [ASK], "messages": 3}, ["--prompt-field", "talk"]),
    ],
)
def test_an_environment_gets_the_other_fields_of_a_row(row: dict[str, Any], more: list[str]) -> None:
    given = tool().options().parse_args(["--model", "x", "--input", "x", "--output", "x", *more])
    asked = tool().to_prompt_row({**row, "answer": 7}, "r:1", given)
    assert asked["answer"] == 7 and ("prompt" in asked) != ("messages" in asked)
    assert "Rain?" in str(asked) and "no" not in asked.values()


@pytest.mark.parametrize("text", ["{", "[1]", "x=1"])
def test_variables_that_are_no_object_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool().main(["--model", "x", "--input", "x", "--output", "x", "--chat-template-kwargs", text])
    assert "--chat-template-kwargs: give a JSON object, such as" in capsys.readouterr().err


def test_other_settings_and_other_rows_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole.jsonl", "whole.jsonl.settings.json", "rows.jsonl"):
        shutil.copy(folder / name, tmp_path)
    before = (tmp_path / "whole.jsonl").read_bytes()
    shutil.copytree(folder / "model", tmp_path / "model")

    def command(*more: str) -> str:
        paths = {
            "--model": tmp_path / "model",
            "--input": tmp_path / "rows.jsonl",
            "--output": tmp_path / "whole.jsonl",
        }
        given = [text for option, path in paths.items() for text in (option, str(path))]
        status = tool().main([*given, *SETTINGS, "--num-samples", "2", "--logprobs", *more])
        said = capsys.readouterr()
        assert (tmp_path / "whole.jsonl").read_bytes() == before
        return said.out if status == 0 else said.err

    assert command() == f"{tmp_path}/whole.jsonl: {ROWS} rows\n", "whole already: no engine is started"
    assert "--temperature is 0.5 here, but 1.0" in command("--temperature", "0.5")
    assert "--max-tokens is 15 here, but 16" in command("--max-tokens", "15")
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("+", "-", 1))
    assert f"{tmp_path}/rows.jsonl:1 is not the row that" in command()
    (tmp_path / "rows.jsonl").write_text(text.split("\n\n", 1)[1])
    assert "rows.jsonl:1 is not the row that" in command() or f"answers {ROWS} rows" in command()
    (tmp_path / "rows.jsonl").write_text(text)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert "the model is " in command()


def test_a_fingerprint_is_of_what_decides(task: Task, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(task.folder / "model", tmp_path / "model"))
    start = fingerprint(task.folder / "model")
    (copy / "best.json").write_text("{}")
    assert fingerprint(copy) == start
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint(copy) != start, name
        (copy / name).write_bytes(content)
    assert fingerprint(copy) == start


def test_devices_under_torchrun_by_hand() -> None:
    def env(rank: int, **more: str) -> dict[str, str]:
        return {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
                "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "x", "MASTER_PORT": "1", **more}  # fmt: skip

    given = env(3)
    assert take_devices(given, 2) == (3, 4)
    assert given == {"CUDA_VISIBLE_DEVICES": "2,3", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    named = env(0, CUDA_VISIBLE_DEVICES="7,5,GPU-1,4")
    assert take_devices(named, 2) == (0, 4) and named["CUDA_VISIBLE_DEVICES"] == "7,5"
    with pytest.raises(ValueError, match=r"names 3 devices, and 2 processes with --tensor 2 need 4"):
        take_devices(env(0, CUDA_VISIBLE_DEVICES="0,1,2"), 2)
    alone = {"HOME": "/"}
    assert take_devices(alone, 4) == (0, 1) and alone == {"HOME": "/"}
