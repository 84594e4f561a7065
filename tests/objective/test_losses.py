"""The losses against hand-worked numbers, a naive formula in plain loops, finite differences, and garbage padding."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective.losses import clipped_surrogate, negative_log_likelihood

F64 = torch.float64
# Rows of unequal length: a prompt of 1 and 3 trained tokens, a prompt of 2 and a hole, a row with nothing to train on.
MASK_BT = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


def one_token(ratio: float, advantage: float, **settings: Any) -> tuple[float, float, dict[str, float]]:
    """Loss, its derivative by the policy's log-probability, and metrics, of one token."""
    policy_BT = torch.tensor([[math.log(ratio) - 1.0]], dtype=F64, requires_grad=True)
    loss_BT, metrics = clipped_surrogate(
        policy_BT,
        rollout_logp_BT=torch.tensor([[-1.0]], dtype=F64),
        advantage_B=torch.tensor([advantage], dtype=F64),
        mask_BT=torch.ones(1, 1, dtype=torch.bool),
        **settings,
    )
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), policy_BT)
    return loss_BT.item(), gradient_BT.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    # clip to [0.8, 1.28]. Where no clip binds, the loss is -rA and, since dr/dlogp = r, so is its derivative.
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # on policy: the plain policy gradient
        (1.0, -2.0, 2.0, 2.0, 0),
        (1.25, 2.0, -2.5, -2.5, 0),  # past 1.2, which only clip-higher lets through
        (1.5, 2.0, -2.56, 0.0, 1),  # min(3, 1.28 * 2)
        (0.5, 2.0, -1.0, -1.0, 0),  # min(1, 1.6): a good token is always let back up
        (0.5, -2.0, 1.6, 0.0, 1),  # min(-1, -1.6)
        (1.5, -2.0, 3.0, 3.0, 0),  # min(-3, -2.56): a bad token is always pushed back down
        (4.0, -2.0, 8.0, 8.0, 0),  # without a bound
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_one_token_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    actual_loss, actual_gradient, metrics = one_token(ratio, advantage, clip_low=0.2, clip_high=0.28)
    assert actual_loss == pytest.approx(loss, abs=1e-14)
    assert actual_gradient == pytest.approx(gradient, abs=1e-14)
    assert metrics == pytest.approx({"ratio": ratio, "clip_fraction": clipped, "gap": abs(math.log(ratio))}, abs=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (4.0, -2.0, 6.0, 0.0, 1),  # max(min(-8, -2.4), 3 * -2) = -6
        (2.0, -2.0, 4.0, 4.0, 0),  # max(-4, -6): below the bound nothing changes
        (0.5, -2.0, 1.6, 0.0, 1),
        (4.0, 2.0, -2.4, 0.0, 1),  # a positive advantage never sees it: min(8, 2.4)
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    actual_loss, actual_gradient, metrics = one_token(ratio, advantage, dual_clip=3.0)
    assert actual_loss == pytest.approx(loss, abs=1e-14)
    assert actual_gradient == pytest.approx(gradient, abs=1e-14)
    assert metrics["clip_fraction"] == clipped


def test_kl_and_entropy_by_hand() -> None:
    # r = 1, A = 2; reference at -1 - ln 2, so log(q/p) = -ln 2, q/p = 1/2 and k3 = 1/2 - 1 + ln 2 = 0.19314718.
    # loss = -2 + 0.1 k3 - 0.01 * 0.7; d/dlogp = -2 + 0.1 (1 - q/p) = -1.95.
    terms = {"reference_logp_BT": torch.tensor([[-1 - math.log(2)]], dtype=F64), "entropy_BT": torch.full((1, 1), 0.7)}
    loss, gradient, metrics = one_token(1.0, 2.0, **terms, kl_coef=0.1, entropy_coef=0.01)
    k3 = -0.5 + math.log(2)
    assert loss == pytest.approx(-2 + 0.1 * k3 - 0.007, abs=1e-9)
    assert gradient == pytest.approx(-1.95, abs=1e-14)
    assert metrics == pytest.approx({"ratio": 1, "clip_fraction": 0, "gap": 0, "kl": k3, "entropy": 0.7}, abs=1e-7)
    # Given without a coefficient they are reported, in whichever estimator, and cost nothing.
    loss, gradient, metrics = one_token(1.0, 2.0, **terms, kl="k1")
    assert (loss, gradient) == (-2.0, -2.0)
    assert metrics["kl"] == pytest.approx(math.log(2), abs=1e-14)


def test_an_advantage_of_zero_never_meets_an_infinite_ratio() -> None:
    # In float32 exp(100) is inf and 0 * inf is NaN: one row that was left out would poison the batch.
    loss_BT, metrics = clipped_surrogate(
        torch.full((2, 1), -1.0),
        rollout_logp_BT=torch.full((2, 1), -101.0),
        advantage_B=torch.tensor([0.0, -1.0]),
        mask_BT=torch.ones(2, 1, dtype=torch.bool),
    )
    assert loss_BT[0].item() == 0.0
    assert loss_BT[1].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert metrics["gap"].tolist() == [[100.0], [100.0]]


# --- against loops -------------------------------------------------------------------------------------------------


def naive(batch: dict[str, Any], clip_low: float, clip_high: float, dual_clip: float | None, kl: str) -> Tensor:
    """The equations of the papers, one token at a time, with `if` for min and max; the loss outside the mask is 0."""
    policy_BT = batch["policy_logp_BT"]
    losses = []
    for b in range(policy_BT.shape[0]):
        row = []
        for t in range(policy_BT.shape[1]):
            if not batch["mask_BT"][b, t]:
                row.append(torch.zeros((), dtype=F64))
                continue
            p, q = policy_BT[b, t], batch["reference_logp_BT"][b, t]
            advantage = batch["advantage_B"][b].item()
            r = torch.exp(p) / torch.exp(batch["rollout_logp_BT"][b, t])
            bounded = torch.tensor(min(max(r.item(), 1 - clip_low), 1 + clip_high), dtype=F64)
            kept = r if 1 - clip_low < r.item() < 1 + clip_high else bounded
            surrogate = r * advantage if r.item() * advantage < bounded.item() * advantage else kept * advantage
            if dual_clip is not None and advantage < 0 and surrogate.item() < dual_clip * advantage:
                surrogate = torch.tensor(dual_clip * advantage, dtype=F64)
            divergence = {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": torch.exp(q) / torch.exp(p) - 1 - (q - p)}[kl]
            row.append(-surrogate + batch["kl_coef"] * divergence - batch["entropy_coef"] * batch["entropy_BT"][b, t])
        losses.append(torch.stack(row))
    return torch.stack(losses)


def random_batch(seed: int, mask_BT: Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    rows, length = mask_BT.shape
    rollout_logp_BT = -1.0 - normal(rows, length).abs()
    return {
        "policy_logp_BT": (rollout_logp_BT + 0.5 * normal(rows, length)).requires_grad_(),
        "rollout_logp_BT": rollout_logp_BT,
        "reference_logp_BT": rollout_logp_BT + 0.5 * normal(rows, length),
        "entropy_BT": normal(rows, length).abs().requires_grad_(),
        "advantage_B": normal(rows),
        "mask_BT": mask_BT,
        "kl_coef": 0.3,
        "entropy_coef": 0.2,
    }


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    bits=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, math.inf)]),
    dual_clip=st.sampled_from([None, 1.1, 3.0]),
    kl=st.sampled_from(["k2", "k3"]),
)
def test_values_and_gradients_against_loops(
    seed: int, bits: list[list[bool]], clip: tuple[float, float], dual_clip: float | None, kl: Any
) -> None:
    batch = random_batch(seed, torch.tensor(bits))
    leaves = (batch["policy_logp_BT"], batch["entropy_BT"])
    upstream_BT = torch.randn(batch["mask_BT"].shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    expected_BT = naive(batch, clip[0], clip[1], dual_clip, kl)
    loss_BT, _ = clipped_surrogate(**batch, clip_low=clip[0], clip_high=clip[1], dual_clip=dual_clip, kl=kl)
    torch.testing.assert_close(loss_BT, expected_BT, rtol=1e-12, atol=1e-12)
    if not batch["mask_BT"].any():
        return
    expected = torch.autograd.grad((upstream_BT * expected_BT).sum(), leaves)
    actual = torch.autograd.grad((upstream_BT * loss_BT).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_against_finite_differences(seed: int, kl: Any, dual_clip: float | None) -> None:
    batch = random_batch(seed, MASK_BT)
    ratio_BT = (batch["policy_logp_BT"] - batch["rollout_logp_BT"]).detach().exp()
    for kink in (0.8, 1.28, 1.5):  # a finite difference across a kink would be wrong, so none may be near
        assert (ratio_BT - kink).abs().min() > 1e-4

    def loss(policy_logp_BT: Tensor, entropy_BT: Tensor) -> Tensor:
        inputs = {**batch, "policy_logp_BT": policy_logp_BT, "entropy_BT": entropy_BT}
        return clipped_surrogate(**inputs, clip_high=0.28, dual_clip=dual_clip, kl=kl)[0]

    assert torch.autograd.gradcheck(loss, (batch["policy_logp_BT"], batch["entropy_BT"]))


# --- outside the mask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, 1.0])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_nothing_leaks_from_outside_the_mask(garbage: float, kl: str) -> None:
    settings = {"kl_coef": 0.3, "entropy_coef": 0.2, "dual_clip": 3.0, "kl": kl}
    clean = random_batch(0, MASK_BT)
    dirty: dict[str, Any] = dict(clean)
    for name in ("policy_logp_BT", "rollout_logp_BT", "reference_logp_BT", "entropy_BT"):
        dirty[name] = clean[name].detach().masked_fill(~MASK_BT, garbage).requires_grad_(clean[name].requires_grad)
    dirty["advantage_B"] = clean["advantage_B"].masked_fill(~MASK_BT.any(dim=1), garbage)

    results = []
    for batch in (clean, dirty):
        loss_BT, metrics = clipped_surrogate(**{**batch, **settings})
        gradients = torch.autograd.grad(loss_BT.sum(), (batch["policy_logp_BT"], batch["entropy_BT"]))
        results.append({"loss": loss_BT, "dlogp": gradients[0], "dentropy": gradients[1], **metrics})
    assert set(results[0]) == {"loss", "dlogp", "dentropy", "ratio", "clip_fraction", "gap", "kl", "entropy"}
    for name, value_BT in results[1].items():
        assert torch.equal(value_BT, results[0][name]), name
        assert not value_BT[~MASK_BT].any(), name  # NaN is true, so this is finite as well as 0


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_negative_log_likelihood(garbage: float) -> None:
    logp_BT = torch.tensor([[garbage, -0.5, -2.0], [garbage, garbage, -3.0]], dtype=F64, requires_grad=True)
    mask_BT = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool)
    loss_BT, metrics = negative_log_likelihood(logp_BT, mask_BT=mask_BT)
    assert loss_BT.tolist() == [[0.0, 0.5, 2.0], [0.0, 0.0, 3.0]]
    assert metrics == {}
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), logp_BT)
    assert gradient_BT.tolist() == [[0.0, -1.0, -1.0], [0.0, 0.0, -1.0]]


# --- what a caller may rely on -------------------------------------------------------------------------------------


def test_only_the_policy_and_its_entropy_get_gradients() -> None:
    batch = random_batch(0, MASK_BT)
    for name in ("rollout_logp_BT", "reference_logp_BT", "advantage_B"):
        batch[name].requires_grad_()
    loss_BT, metrics = clipped_surrogate(**batch)
    leaves = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.requires_grad}
    gradients = torch.autograd.grad(loss_BT.sum(), list(leaves.values()), allow_unused=True)
    reached = {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    assert len(leaves) == 5 and reached == {"policy_logp_BT", "entropy_BT"}
    assert not any(value_BT.requires_grad for value_BT in metrics.values())


def test_mixed_precision_inputs_keep_the_policys_dtype() -> None:
    batch = random_batch(0, MASK_BT)
    exact_BT, _ = clipped_surrogate(**batch)
    batch["policy_logp_BT"] = batch["policy_logp_BT"].detach().float()
    loss_BT, _ = clipped_surrogate(**batch)
    assert loss_BT.dtype == torch.float32
    torch.testing.assert_close(loss_BT, exact_BT.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": -0.1}, r"clip_low=-0.1 must lie in \[0, 1\]"),
        ({"clip_low": 1.5}, r"clip_low=1.5 must lie in \[0, 1\]"),
        ({"clip_high": math.nan}, "clip_high=nan must be 0 or more"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be more than 1"),
        ({"reference_logp_BT": None}, "kl_coef=0.3 needs reference_logp_BT"),
        ({"entropy_BT": None}, "entropy_coef=0.2 needs entropy_BT"),
        ({"kl": "k1"}, "kl=k1 with kl_coef=0.3 regularises nothing"),
        ({"kl": "k4"}, "kl='k4' is not an estimator"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(**{**random_batch(0, MASK_BT), **settings})


@pytest.mark.parametrize(
    "wrong",
    [
        {"rollout_logp_BT": torch.zeros(3, 4)},
        {"reference_logp_BT": torch.zeros(1, 5)},
        {"entropy_BT": torch.zeros(3)},
        {"advantage_B": torch.zeros(3, 1)},
        {"mask_BT": torch.ones(3, 5)},
        {"policy_logp_BT": torch.zeros(3, 5, dtype=torch.bfloat16)},
        {"policy_logp_BT": torch.zeros(15)},
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError):
        clipped_surrogate(**{**random_batch(0, MASK_BT), **wrong})
