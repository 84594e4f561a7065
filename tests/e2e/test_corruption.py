"""Whatever goes wrong between a policy and an engine is an error that names it; and deltas change nothing but bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks, Torchrun

WAYS = ["whole", "gloo", "deltas"]
MOE = "model.layers.1.mlp.experts"
MISMATCH = "reshard: checksum mismatch in {} from rank 0 to rank 1: {}"
KERNEL = "reshard: the rollout engine's packed kernel of {} does not hold what was written"
NAMED = {
    "flipped bit": MISMATCH.format(
        f"{MOE}.3.down_proj.weight[0:128, 0:80]",
        "the message does not hold what decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight held",
    ),
    "skipped write": MISMATCH.format(
        "model.layers.1.input_layernorm.weight[0:128]", "after the write model.layers.1.input_layernorm:weight does not"
    ),
    "swapped experts": MISMATCH.format(
        f"{MOE}.0.up_proj.weight[0:80, 0:128]", f"after the write {MOE}.routed_experts:w13_weight does not"
    ),
    "lost region": "reshard: 128 of 128 elements of model.layers.1.input_layernorm.weight were not written",
    "stale kernel": KERNEL.format("model.layers.0.self_attn.qkv_proj (256 x 128)"),
    "stale experts": KERNEL.format(f"{MOE}, expert 0, gate and up projection (160 x 128)"),
    "swapped kernels": KERNEL.format(f"{MOE}, expert 1, gate and up projection (160 x 128)"),
}


Meet = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def meet(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Meet:
    """meet(fault, how): what both ranks saw."""
    folder = tmp_path_factory.mktemp("corruption") / "model"
    return lambda fault, how: ranks(2).run("tests.e2e.corruption_on_ranks:meet", folder, fault, how)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("fault", NAMED)
def test_what_goes_wrong_is_named_and_nobody_hangs(meet: Meet, fault: str, how: str) -> None:
    """The rank that finds it says what; its engine refuses to generate until a later transfer succeeds."""
    sender, receiver = meet(fault, how)
    assert receiver["error"].startswith(f"RuntimeError: {NAMED[fault]}")
    assert not sender["error"] and not receiver["ready"]
    assert max(sender["seconds"], receiver["seconds"]) < 20
    assert not sender["afterwards"] and not receiver["afterwards"]
    assert receiver["answers"], "after the next transfer the engine answers otherwise than transformers"


@pytest.mark.parametrize("how", WAYS)
def test_a_message_of_the_transfer_before_is_refused(meet: Meet, how: str) -> None:
    assert "from rank 0 to rank 1" in meet("replayed message", how)[1]["error"]


@pytest.mark.parametrize("fault", ["swapped experts", "stale kernel"])
def test_the_whole_job_ends(fault: str, torchrun: Torchrun, tmp_path: Path) -> None:
    """The sender had no error: it hears of it and leaves too."""
    done = torchrun(2, ["-m", "tests.e2e.corrupted_job", str(tmp_path), fault], seconds=90)
    assert done.returncode != 0
    assert f"aligner: error on rank 1: RuntimeError: {NAMED[fault]}" in done.stderr
    assert done.stderr.count("aligner: error on rank") == 1
    assert "rank 0 exits because rank 1 failed" in done.stderr


SAME = ("reward", "length", "tokens", "loss", "grad_norm", "gap_max")


@pytest.mark.matrix
def test_deltas_change_nothing_but_the_bytes(job: Callable[..., list[dict[str, Any]]]) -> None:
    """The same job with and without them, over bfloat16: equal samples and losses to the last bit, from fewer bytes."""
    settings = ("placement=split", "rollout.dtype=bfloat16", "train.steps=3", "policy.optimizer.lr=1e-5")
    expected, rows = job(2, *settings), job(2, *settings, "reshard.deltas=true")
    assert len(rows) == len(expected) == 3
    for row, want in zip(rows, expected, strict=True):  # the transfer before the first step has no row
        assert {name: row[name] for name in SAME} == {name: want[name] for name in SAME}
        assert row["reshard_minimum_bytes"] == want["reshard_minimum_bytes"] == want["reshard_moved_bytes"] > 0
        assert 0 < row["reshard_changed_bytes"] < row["reshard_minimum_bytes"]
        assert 0 < row["reshard_moved_bytes"] < row["reshard_minimum_bytes"]
        assert row["reshard_checksummed"] == want["reshard_checksummed"] > 0
    assert len({row["loss"] for row in rows}) == 3, "the policy does not move"
