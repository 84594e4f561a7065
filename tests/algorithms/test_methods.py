"""Every method of conf/algorithm gives the same numbers under any layout, starts where its formula says, and moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.algorithms.methods import PAPERS, UNTRAINED, Found, Row, cases, methods, run_method
from tests.conftest import Ranks
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

FSDP = [f"{role}.engine=fsdp" for role in ("policy", "critic", "reward_model")]
"""Every model; the reference is the policy's."""
ENGINES: dict[int, dict[str, list[str]]] = {
    1: {"FSDP": FSDP},
    2: {
        "FSDP on 2": FSDP,
        "policy on FSDP": ["policy.engine=fsdp", "reference.engine=megatron"],
        "others on FSDP": ["reference.engine=fsdp", "critic.engine=fsdp", "placement.reference.ranks=[1]"],
        "FSDP, each on its own rank": [*FSDP, *MORE_TWO["each on its own rank"], "policy.recompute=full"],
    },
    4: {
        "FSDP on 4": FSDP,
        "FSDP, 2 replicas": [*FSDP, "placement.policy.replicas=2", "policy.reshard_after_forward=false"],
        "FSDP 0-1, others 2-3": [
            *FSDP, "placement.policy.ranks=0-1", "placement.critic.ranks=2-3", "placement.reference.ranks=2-3",
            "placement.reward_model.ranks=2-3", "placement.reward.ranks=[3]",
        ],
        "FSDP 0-1 in 2 replicas, others 2-3": [
            *FSDP, "placement.policy.ranks=0-1", "placement.policy.replicas=2", "placement.critic.ranks=2-3",
            "placement.critic.replicas=2", "placement.reference.ranks=2-3", "placement.reward_model.ranks=2-3",
            "placement.reward.ranks=[3]",
        ],
    },
}  # fmt: skip
STEPS_OF_ENGINES = 5
"""Steps that the two training engines are compared over; layouts of one engine over 3."""

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
OF_CASE: dict[str, dict[str, float]] = {
    # no mean over tokens but one of differences summed over responses
    "kto": {"kl": 2e-6},
    # a mean of terms of 4 to 9 nats and either sign, which all but cancel in step 3, after a step with a gradient of 363
    "rloo": {"loss": 1e-5},
}
"""The same for one method."""
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
def found(cache: dict[str, Found], ranks: Ranks, task: Any) -> Callable[..., Found]:
    """found(size, case, layouts): the runs of a case in a world of that size, made once."""

    def of(size: int, case: str, layouts: dict[str, list[str]], steps: int = 3) -> Found:
        key = f"{size} {case} {sorted(layouts)} {steps}"
        if key not in cache:
            known = cases() | UNTRAINED
            overrides = known[case] if case in known else [f"algorithm={case}", *PAPERS[case]]
            cache[key] = run_method(ranks(size), task.folder, overrides, layouts, 280, steps)
        return cache[key]

    return of


@pytest.fixture
def alone(found: Callable[..., Found]) -> Callable[[str], list[Row]]:
    """alone(case): its steps on one rank."""
    return lambda case: found(1, case, {"one rank": []})["one rank"]


def differences(case: str, step: int, got: Row, want: Row) -> list[str]:
    """What is not the same, in words."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    near_zero = NEAR_ZERO | OF_CASE.get(case, {})
    same_models = step == 1 and case not in WITHOUT_REFERENCE
    return [
        f"{name}: {got[name]:.9g} for {want[name]:.9g}"
        for name in want
        if not name.endswith(OF_THE_LAYOUT)
        and not abs(got[name] - want[name]) <= max(RELATIVE * abs(want[name]), near_zero.get(name, 0.0))
        and not (same_models and name in SIGNS)
    ]


def check_layouts(case: str, one: list[Row], others: Found) -> None:
    off = [
        f"{layout}, step {step}: {', '.join(said)}"
        for layout, rows in others.items()
        for step, (got, want) in enumerate(zip(rows, one, strict=True), start=1)
        if (said := differences(case, step, got, want))
    ]
    assert not off, "\n".join(off)


def check_engines(case: str, size: int, found: Callable[..., Found]) -> None:
    """FSDP on `size` ranks against Megatron-core on one."""
    one = found(1, case, {"one rank": []}, STEPS_OF_ENGINES)["one rank"]
    assert len(one) == STEPS_OF_ENGINES
    check_layouts(case, one, found(size, case, ENGINES[size], STEPS_OF_ENGINES))


def test_every_method_has_a_case() -> None:
    tried = {override.removeprefix("algorithm=") for more in cases().values() for override in more}
    assert set(methods()) - set(UNTRAINED) - set(PAPERS) <= tried


@pytest.mark.parametrize("case", cases())
def test_every_method_is_the_same_under_any_layout(
    case: str, found: Callable[..., Found], alone: Callable[[str], list[Row]]
) -> None:
    check_layouts(case, alone(case), found(2, case, TWO))


@pytest.mark.parametrize("case", ["sft", "dpo", "grpo", "ppo", "reward_model", *UNTRAINED])
def test_some_methods_are_the_same_on_fsdp(case: str, found: Callable[..., Found]) -> None:
    check_engines(case, 1, found)


@pytest.mark.parametrize("case", cases())
def test_it_learns_from_something(case: str, alone: Callable[[str], list[Row]]) -> None:
    rows = alone(case)
    assert len(rows) == 3
    for row in rows:
        assert row["grad_norm"] > 0.05, "nothing to learn from"
        stale = row.get("staleness_max", 0.0) > 0
        assert stale or row.get("gap", 0.0) < 1e-5, "the engine has not got the policy's weights"
    if case in FIRST_LOSS:
        assert rows[0]["loss"] == pytest.approx(FIRST_LOSS[case], rel=1e-6)
        assert abs(rows[2]["loss"] - rows[0]["loss"]) > 1e-4, "the model does not move"
    if "kl" in rows[0] and case != "kto" and "several" not in case:
        assert rows[0]["kl"] < 1e-9 and min(rows[1]["kl"], rows[2]["kl"]) > 1e-4, "the policy stays at the reference"


def test_every_metric_of_every_method_is_declared(alone: Callable[[str], list[Row]]) -> None:
    rows = [row for case in cases() for row in alone(case)]
    assert undeclared({name for row in rows for name in row} - {"samples"}) == []  # the rank's own, of its samples


def test_what_each_method_is_named_for_happens(alone: Callable[[str], list[Row]]) -> None:
    assert any(row["sampled_groups"] > 4 for row in alone("dapo")), "no group was replaced"
    assert all(row["batch_filled"] == 1 for row in alone("dapo"))
    assert all(row["critic_grad_norm"] > 0.05 for row in alone("ppo"))
    assert [row["kl_coef"] for row in alone("ppo")] == [0.1] * 3
    # a KL far below its target of 2: each step lowers the price by rate x max_error = 2%
    assert [row["kl_coef"] for row in alone("ppo, several steps a batch")] == pytest.approx([0.1, 0.098, 0.09604])
    assert alone("kto")[0]["kl"] == 0 < alone("kto")[1]["kl"]
    ahead = alone("grpo_decoupled, ahead, several steps a batch")
    assert [row["staleness"] for row in ahead] == [0, 1, 1]
    assert ahead[1]["weight_max"] == pytest.approx(1.01) and ahead[1]["bounded_fraction"] > 0
    assert alone("grpo_decoupled")[1]["staleness_max"] == 1 > alone("grpo_decoupled")[1]["staleness"] > 0
    assert any(row["ratio_max"] > 1.05 for row in alone("grpo, several steps a batch")), (
        "the later steps are off-policy"
    )


@pytest.mark.matrix
@pytest.mark.parametrize("case", PAPERS)
def test_published_settings_run_alike_under_two_layouts(
    case: str, found: Callable[..., Found], alone: Callable[[str], list[Row]]
) -> None:
    rows = alone(case)
    assert len(rows) == 3 and all(row["grad_norm"] > 0.05 for row in rows)
    check_layouts(case, rows, found(2, case, TWO))


@pytest.mark.matrix
@pytest.mark.parametrize("case", cases())
def test_every_method_under_more_layouts(
    case: str, found: Callable[..., Found], alone: Callable[[str], list[Row]]
) -> None:
    check_layouts(case, alone(case), found(2, case, MORE_TWO))
    check_layouts(case, alone(case), found(4, case, FOUR))


@pytest.mark.matrix
@pytest.mark.parametrize("size", ENGINES)
@pytest.mark.parametrize("case", [*cases(), *UNTRAINED])
def test_every_method_is_the_same_on_either_backend(case: str, size: int, found: Callable[..., Found]) -> None:
    check_engines(case, size, found)
