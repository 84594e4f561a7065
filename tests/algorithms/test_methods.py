"""Every method of conf/algorithm gives the same numbers under any layout, starts where its formula says, and moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.algorithms.methods import PAPERS, UNTRAINED, Found, Row, cases, methods, run_methods
from tests.report.metric_names import undeclared

TENSOR, PIPELINE = "placement.policy.tensor=2", "placement.policy.pipeline=2"
CONTEXT = "placement.policy.context=2"
TWO = {"tensor 2": [TENSOR]}
MORE_TWO = {
    "data 2": [],
    "pipeline 2": [PIPELINE],
    "context 2": [CONTEXT],
    "context 2 on its own": [
        CONTEXT, "placement.reference.ranks=[0]", "placement.critic.ranks=[1]", "placement.reward_model.ranks=all",
        "placement.reward_model.context=2", "policy.recompute=full",
    ],
    "tensor 2, sequence parallel": [TENSOR, "placement.policy.sequence_parallel=true"],
    "each on its own rank": [
        "placement.policy.ranks=[0]", "placement.reference.ranks=[1]", "placement.critic.ranks=[1]",
        "placement.reward_model.ranks=[1]", "placement.reward.ranks=[1]",
    ],
}  # fmt: skip
FOUR = {
    "context 2, tensor 2, sequence parallel": [CONTEXT, TENSOR, "placement.policy.sequence_parallel=true"],
    "context 2, pipeline 2": [CONTEXT, PIPELINE],
    "context 2, data 2": [CONTEXT],
    "tensor 2, pipeline 2": [TENSOR, PIPELINE],
    "data 4": [],
    "data 2, tensor 2, sequence parallel": [TENSOR, "placement.policy.sequence_parallel=true"],
    "policy 0-1, others 2-3": [
        "placement.policy.ranks=0-1", TENSOR, "placement.critic.ranks=2-3", "placement.reference.ranks=2-3",
        "placement.reference.pipeline=2", "placement.reward_model.ranks=2-3", "placement.reward.ranks=[3]",
    ],
}  # fmt: skip

RELATIVE = 1e-5
NEAR_ZERO: dict[str, float] = {
    # Differences of log-probabilities of 4 to 9 nats, each rounded to 5e-7: their own size says nothing of their error.
    "gap": 5e-6,
    "gap_max": 2e-5,
    "kl": 1e-7,
    # of one token of 0.5 after two steps whose gradients grow fivefold: micro_tokens alone moves it by 1.4e-6, layouts by 1e-5
    "kl_max": 2e-5,
    # such differences summed over a response of 20 to 60 tokens (times beta in the rewards of preference losses)
    "response_kl": 2e-5,
    "chosen_reward": 2e-6,
    "rejected_reward": 2e-6,
    "margin": 2e-6,
    "reward": 2e-6,
    # a maximum of exp(difference)
    "ratio_max": 1e-5,
}
"""Metric -> how far it may be off where that is more than the relative bound, in its own unit."""
KTO_KL = 2e-6
"""The same for KTO's kl, which is no mean over tokens but one of differences summed over responses."""
OF_THE_LAYOUT = ("imbalance", "padding")
"""What the layout does to the work, and not to the result."""
SIGNS = ("pair_accuracy", "label_accuracy")
"""Shares of rows by the sign of a margin: in step 1, where policy and reference are the same model, of rounding errors."""
WITHOUT_REFERENCE = ("simpo", "orpo", "reward_model")

LN2 = math.log(2)
FIRST_LOSS = {"dpo": LN2, "robust_dpo": LN2, "online_dpo": LN2, "reward_model": LN2, "ipo": 25.0, "kto": 0.5}
"""Where policy and reference agree (or the new head says 0): log 2, (1 / (2 beta))^2, 1 - sigmoid(0)."""


@pytest.fixture(scope="module")
def cache() -> dict[str, Found]:
    return {}


@pytest.fixture
def found(cache: dict[str, Found], torchrun: Callable[..., Any], task: Any, tmp_path: Path) -> Callable[..., Found]:
    """found(ranks, layouts): the runs, made once."""

    def of(ranks: int, layouts: dict[str, list[str]], seconds: float = 280) -> Found:
        key = f"{ranks} {sorted(layouts)}"
        if key not in cache:
            cache[key] = run_methods(torchrun, task.folder, tmp_path, ranks, layouts, seconds=seconds)
        return cache[key]

    return of


def differences(case: str, step: int, got: Row, want: Row) -> list[str]:
    """What is not the same, in words."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    near_zero = NEAR_ZERO | ({"kl": KTO_KL} if case == "kto" else {})
    same_models = step == 1 and case not in WITHOUT_REFERENCE
    return [
        f"{name}: {got[name]:.9g} for {want[name]:.9g}"
        for name in want
        if not name.endswith(OF_THE_LAYOUT)
        and not abs(got[name] - want[name]) <= max(RELATIVE * abs(want[name]), near_zero.get(name, 0.0))
        and not (same_models and name in SIGNS)
    ]


def check_layouts(one: dict[str, list[Row]], others: Found) -> None:
    off = [
        f"{layout}, {case}, step {step}: {', '.join(said)}"
        for layout, found in others.items()
        for case, rows in found.items()
        for step, (got, want) in enumerate(zip(rows, one[case], strict=True), start=1)
        if (said := differences(case, step, got, want))
    ]
    assert not off, "\n".join(off)


def test_every_method_has_a_case() -> None:
    tried = {override.removeprefix("algorithm=") for more in cases().values() for override in more}
    assert set(methods()) - UNTRAINED - set(PAPERS) <= tried


def test_every_method_is_the_same_under_any_layout(found: Callable[..., Found]) -> None:
    one = found(1, {"one rank": []})["one rank"]
    assert set(one) == set(cases())
    check_layouts(one, found(2, TWO))


@pytest.mark.parametrize("case", cases())
def test_it_learns_from_something(case: str, found: Callable[..., Found]) -> None:
    rows = found(1, {"one rank": []})["one rank"][case]
    assert len(rows) == 3
    for row in rows:
        assert row["grad_norm"] > 0.05, "nothing to learn from"
        stale = row.get("staleness_max", 0.0) > 0
        assert stale or row.get("gap", 0.0) < 1e-5, "the engine has not got the policy's weights"
    if case in FIRST_LOSS:
        assert rows[0]["loss"] == pytest.approx(FIRST_LOSS[case], rel=1e-6)
        assert abs(rows[2]["loss"] - rows[0]["loss"]) > 1e-4, "the model does not move"
    if "kl" in rows[0] and case != "kto" and "several" not in case:
        assert rows[0]["kl"] < 1e-9 < 1e-4 < rows[1]["kl"] < rows[2]["kl"], "the policy does not leave the reference"


def test_every_metric_of_every_method_is_declared(found: Callable[..., Found]) -> None:
    rows = [row for case in found(1, {"one rank": []})["one rank"].values() for row in case]
    assert undeclared({name for row in rows for name in row} - {"samples"}) == []  # the rank's own, of its samples


def test_what_each_method_is_named_for_happens(found: Callable[..., Found]) -> None:
    one = found(1, {"one rank": []})["one rank"]
    assert any(row["sampled_groups"] > 4 for row in one["dapo"]), "no group was replaced"
    assert all(row["batch_filled"] == 1 for row in one["dapo"])
    assert all(row["critic_grad_norm"] > 0.05 for row in one["ppo"])
    assert [row["kl_coef"] for row in one["ppo"]] == [0.1] * 3
    # a KL below its target of 0.02: each step lowers the price by rate x max_error = 2%
    assert [row["kl_coef"] for row in one["ppo, several steps a batch"]] == pytest.approx([0.1, 0.098, 0.09604])
    assert one["kto"][0]["kl"] == 0 < one["kto"][1]["kl"]
    ahead = one["grpo_decoupled, ahead, several steps a batch"]
    assert [row["staleness"] for row in ahead] == [0, 1, 1]
    assert ahead[1]["weight_max"] == pytest.approx(1.01) and ahead[1]["bounded_fraction"] > 0
    assert one["grpo_decoupled"][1]["staleness_max"] == 1 > one["grpo_decoupled"][1]["staleness"] > 0
    assert any(row["ratio_max"] > 1.05 for row in one["grpo, several steps a batch"]), "the later steps are off-policy"


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_published_settings_run_alike_under_two_layouts(
    torchrun: Callable[..., Any], task: Any, tmp_path: Path
) -> None:
    chosen = {name: [f"algorithm={name}", *more] for name, more in PAPERS.items()}
    one = run_methods(torchrun, task.folder, tmp_path, 1, {"one rank": []}, chosen=chosen)["one rank"]
    assert set(one) == set(PAPERS)
    for name, rows in one.items():
        assert len(rows) == 3 and all(row["grad_norm"] > 0.05 for row in rows), name
    check_layouts(one, run_methods(torchrun, task.folder, tmp_path, 2, TWO, chosen=chosen))


@pytest.mark.matrix
@pytest.mark.timeout(3000)
def test_every_method_under_more_layouts(found: Callable[..., Found]) -> None:
    one = found(1, {"one rank": []}, seconds=900)["one rank"]
    check_layouts(one, found(2, MORE_TWO, seconds=900))
    check_layouts(one, found(4, FOUR, seconds=1500))
