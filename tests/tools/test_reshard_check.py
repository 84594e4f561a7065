"""tools/reshard_check.py against numbers worked by hand, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fork_server

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
NORM, VOCABULARY = 64, 256 * 64
CUT_LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 128 * 64
"""Elements of a layer that tensor ranks share out: queries, keys and values, output, MLP."""
WHOLE = 2 * VOCABULARY + 2 * (CUT_LAYER + 2 * NORM) + NORM
NORMS = 5 * NORM


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/reshard_check.py"), *map(str, arguments)]
    return fork_server.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, check=False)


def table(out: str) -> dict[int, list[int]]:
    """Rank -> bytes sent, passed on, received and copied."""
    rows = [line.replace(",", "").replace(" B", "").split() for line in out.splitlines()]
    return {int(row[0]): [int(cell) for cell in row[1:]] for row in rows if row and row[0].isdecimal()}


def test_one_rank_to_one_rank_moves_the_whole_model(model: Path) -> None:
    done = run("--model", model / "config.json", "--train", "tp=1", "--infer", "tp=1", "--gbps", 1e-4)
    assert done.returncode == 0, done.stderr
    size = 2 * WHOLE
    assert table(done.stdout) == {0: [size, 0, 0, 0], 1: [0, 0, size, 0]}
    assert f"{WHOLE:,} parameters" in done.stdout
    assert f"{size / 1e5:.3f} s at 0.0001 GB/s" in done.stdout


def test_tensor_ranks_send_their_part_once_and_replicas_pass_it_on(model: Path) -> None:
    """Two holders of halves, two replicas of halves each: either half goes out once, and each replica passes on half
    of what it got; of the norms, which both hold and all four want, each byte goes out once and is passed on thrice."""
    done = run("--model", model, "--train", "tp=2", "--infer", "tp=2,replicas=2", "--dtype", "float32")
    found = table(done.stdout)
    half, norms = 4 * (WHOLE - NORMS) // 2, 4 * NORMS
    assert [found[rank][2] for rank in range(6)] == [0, 0, *[half + norms] * 4]
    assert found[0][0] + found[1][0] == 2 * half + norms
    assert abs(found[0][0] - half) <= norms and abs(found[1][0] - half) <= norms
    assert sum(row[1] for row in found.values()) == 2 * half + 3 * norms
    for rank in range(2, 6):
        assert abs(found[rank][1] - half / 2) <= 0.2 * half
    assert f"moved:          {4 * (half + norms):,} B" in done.stdout


def test_colocated_ranks_copy_what_they_hold(model: Path) -> None:
    """Halves on both sides: all is there already. Halves to wholes: the other half comes, from the only holder."""
    same = table(run("--model", model, "--train", "tp=2", "--infer", "tp=2", "--colocated").stdout)
    half, norms = WHOLE - NORMS, 2 * NORMS
    assert same == {rank: [0, 0, 0, half + norms] for rank in range(2)}
    wider = table(run("--model", model, "--train", "tp=2", "--infer", "tp=1,replicas=2", "--colocated").stdout)
    assert wider == {rank: [half, 0, half, half + norms] for rank in range(2)}


def test_stages_send_their_own_layers(model: Path) -> None:
    found = table(run("--model", model, "--train", "pp=2", "--infer", "tp=1", "--ranks", "all").stdout)
    layer = CUT_LAYER + 2 * NORM
    assert [row[0] for row in found.values()] == [2 * (VOCABULARY + layer), 2 * (VOCABULARY + layer + NORM), 0]


def test_many_ranks_are_summed_up(model: Path) -> None:
    done = run("--model", model, "--train", "tp=2,dp=8", "--infer", "tp=2,replicas=8")
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    received = 2 * ((WHOLE - NORMS) // 2 + NORMS)
    for name in ("infer min", "infer mean", "infer max"):
        assert f"{received:,} B" in lines[name]
    assert "of 8 ranks planned one by one" in done.stdout


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--train": "tp=3"}, "--train tp=3 does not divide"),
        ({"--train": "tp=2,pp=3"}, "--train pp=3 does not divide"),
        ({"--infer": "tp=8"}, "--infer tp=8 does not divide"),
        ({"--train": "tensor=2"}, "'tensor=2'; use key=number"),
        ({"--train": "tp=two"}, "'tp=two'; use key=number"),
        ({"--infer": "tp=2,ep=4"}, "--infer ep=4 does not divide"),
        ({"--infer": ""}, "use key=number"),
        ({"--ranks": "none"}, "--ranks='none'"),
        ({"--gbps": "0"}, "--gbps=0.0"),
    ],
)
def test_bad_input_is_one_line(model: Path, changed: dict[str, str], said: str) -> None:
    given = {"--model": str(model), "--train": "tp=1", "--infer": "tp=1", **changed}
    done = run(*(word for pair in given.items() for word in pair))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_unknown_option_is_refused(model: Path) -> None:
    done = run("--model", model, "--train", "tp=1", "--infer", "tp=1", "--colour", "red")
    assert done.returncode == 2 and "--colour" in done.stderr
