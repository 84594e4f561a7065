"""What ranks do in the tests of steps that are left out.

A case is "loss", "gradient" or "scores" (what is NaN, on row 5 alone; scores: of a reward model), a dtype, "shared" or "whole" (distributed optimizer or not) or
"fsdp" (the engine) and sizes, such as "gradient float32 shared tensor=2". Beside the policy that meets bad batches goes one that never does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.data.samples import Samples, pad_rows
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.not_finite import NotFinite
from aligner.trainer.offending_batch import load_offending
from aligner.trainer.policy import Policy
from aligner.trainer.reward_model import RewardModel

BAD = 5
LENGTHS = [9, 14, 12, 7, 11, 13]


def good_loss(policy_logp_BT: Tensor, *, mask_BT: Tensor, advantage_B: Tensor) -> Any:
    return -policy_logp_BT * advantage_B[:, None], {}


def bad_loss(policy_logp_BT: Tensor, *, mask_BT: Tensor, advantage_B: Tensor, row_B: Tensor) -> Any:
    """NaN where the row is the bad one."""
    here_B = row_B == BAD
    return torch.where(here_B[:, None], torch.nan, 1.0) * policy_logp_BT, {}


def bad_gradient(policy_logp_BT: Tensor, *, mask_BT: Tensor, advantage_B: Tensor, row_B: Tensor) -> Any:
    """The loss is finite; the slope of a root at 0 is not."""
    here_B = row_B == BAD
    nothing_BT = (policy_logp_BT - policy_logp_BT.detach()).abs()
    return policy_logp_BT + torch.where(here_B[:, None], nothing_BT, 1.0).sqrt(), {}


def good_scores(score_B: Tensor, *, mask_BT: Tensor, advantage_B: Tensor) -> Any:
    return -score_B * advantage_B, {}


def bad_scores(score_B: Tensor, *, mask_BT: Tensor, row_B: Tensor) -> Any:
    """NaN where the row is the bad one, with a loss for each row."""
    return torch.where(row_B == BAD, torch.nan, 1.0) * score_B, {}


LOSSES = {"loss": (good_loss, bad_loss), "gradient": (good_loss, bad_gradient), "scores": (good_scores, bad_scores)}


def batch() -> Samples:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in LENGTHS]
    length_B = torch.tensor(LENGTHS)
    place_T = torch.arange(max(LENGTHS))
    mask_BT = (place_T >= 3) & (place_T < length_B[:, None])
    fields = [{"row": row, "prompt": f"question {row}"} for row in range(len(LENGTHS))]
    return Samples(pad_rows(rows, torch.long), torch.full((6,), 3), length_B, mask_BT, torch.arange(6), fields)


def weights(policy: Policy) -> list[Tensor]:
    """And float32 masters."""
    pieces = [policy.weights.view(piece).clone() for piece in policy.weights.pieces()]
    return pieces + [slice_.master.detach().clone() for slice_ in policy.engine.optimizer_slices()]


def moments(policy: Policy) -> list[Tensor]:
    return [value.clone() for slice_ in policy.engine.optimizer_slices() for value in slice_.moments.values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    assert one and len(one) == len(other)
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Case:
    def __init__(self, text: str, model: Path, out: Path, world: World) -> None:
        self.text, self.out, self.world = text, out / text.replace(" ", "_"), world
        self.kind, self.dtype, how, *sizes = text.split()
        self.model, self.distributed, self.engine = model, how == "shared", "fsdp" if how == "fsdp" else "megatron"
        self.sizes: Any = {axis: int(size) for axis, size in (size.split("=") for size in sizes)}

    def policy(self, name: str, not_finite: NotFinite | None = None) -> Any:
        mesh = Mesh(tuple(range(self.world.size)), name="policy", **self.sizes)
        optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_steps=4, distributed=self.distributed)
        config = PolicyConfig(engine=self.engine, dtype=self.dtype, micro_tokens=24, optimizer=optimizer)
        given: Any = {"not_finite": not_finite, "offending": self.out / "offending", "total_steps": 10}
        spec, kind = read_spec(self.model), Policy
        if self.kind == "scores":
            spec, kind = with_scalar_head(spec), RewardModel
        return kind(f"{name} {self.text}", self.world, mesh, spec, config, **given)

    def update(self, policy: Policy, loss: Any) -> dict[str, float]:
        placed = policy.scatter(batch())
        row_B = policy.map(lambda samples: torch.tensor([field["row"] for field in samples.fields]), placed)
        advantage_B = policy.map(lambda row: row - 2.5, row_B)
        return policy.update(loss, placed, row_B=row_B, advantage_B=advantage_B).gather()  # type: ignore[no-any-return]


def check(world: World, model: Path, out: Path, text: str) -> None:
    case = Case(text, model, out, world)
    good, bad = LOSSES[case.kind]
    met = case.policy("met", NotFinite(max_in_row=2))
    spared = case.policy("spared")
    for policy in (met, spared):
        assert "skipped_steps" not in case.update(policy, good)
    before, state = weights(met), moments(met)
    for number in (1, 2):
        row = case.update(met, bad)
        assert row["skipped_steps"] == 1.0 and "lr" not in row, row
        assert (row["loss"] == row["loss"]) == (case.kind == "gradient"), row
        assert (met.skips.in_row, met.skips.total, met.optimizer_steps) == (number, number, 1)
        assert same(before, weights(met)) and same(state, moments(met)), case.text
    after = [case.update(policy, good) for policy in (met, spared)]
    assert met.skips.in_row == 0 and met.skips.total == 2
    # lr too: the schedule is where it would be
    assert after[0] == after[1], after
    assert same(weights(met), weights(spared)) and same(moments(met), moments(spared)), case.text
    assert not same(before, weights(met))
    check_stop(case, met, bad)
    check_loaded(case, bad)


def check_stop(case: Case, met: Policy, bad: Any) -> None:
    """The third in a row ends it: every rank hears of it, and its batch is on disk."""
    case.world.journal.step = 7
    before = weights(met)
    for _ in range(2):
        case.update(met, bad)
    try:
        case.update(met, bad)
    except ValueError as error:
        said = str(error)
    else:
        raise AssertionError("a third step was left out")
    what = "the gradient norm is nan" if case.kind == "gradient" else "the loss is nan at optimizer step 2"
    for words in (what, "3 such steps in a row", "guards.not_finite.max_in_row=2", "offending/step_7"):
        assert words in said, said
    assert same(before, weights(met))


def check_loaded(case: Case, bad: Any) -> None:
    """What is on disk is the batch, whole; trained on again, it is as bad."""
    samples, fields = load_offending(case.out / "offending" / "step_7")
    whole = batch()
    order = [field["row"] for field in samples.fields]
    assert sorted(order) == list(range(6)) and samples.rows == 6
    assert fields["row_B"].tolist() == order and fields["advantage_B"].tolist() == [row - 2.5 for row in order]
    for name in ("tokens_BT", "mask_BT", "length_B", "prompt_len_B", "prompt_index_B"):
        assert torch.equal(getattr(samples, name), getattr(whole, name)[torch.tensor(order)]), name
    policy = case.policy("again", NotFinite(max_in_row=1))
    placed = policy.scatter(samples)
    refs = {name: policy.scatter_like(placed, value) for name, value in fields.items()}
    assert policy.update(bad, placed, **refs).gather()["skipped_steps"] == 1.0
    refs["row_B"] = policy.scatter_like(placed, torch.where(fields["row_B"] == BAD, 0, fields["row_B"]))
    assert "skipped_steps" not in policy.update(bad, placed, **refs).gather(), "without the bad row it is a good batch"
