"""KL estimators against exact KL, against the table of Schulman's note, and at the ends of their range."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aligner.objective.kl import MAX_LOG_RATIO, Estimator, kl_estimate

KINDS: tuple[Estimator, ...] = ("k1", "k2", "k3")
# Over three outcomes, chosen so that every logarithm is one of 2 or 3/4.
P_V = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
Q_V = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
# KL(p || q) = 0.5 ln 2 - 0.25 ln 2 + 0.25 ln 1 = 0.25 ln 2.
EXACT = 0.25 * math.log(2)


def estimate(p_V: Tensor, q_V: Tensor, kind: Estimator) -> Tensor:
    """The estimate at each of the outcomes, as one row of V tokens."""
    return kl_estimate(p_V.log()[None], q_V.log()[None], kind)[0]


def moments(p_V: Tensor, value_V: Tensor) -> tuple[float, float]:
    mean = (p_V * value_V).sum()
    return mean.item(), (p_V * (value_V - mean).square()).sum().item()


def test_values_by_hand() -> None:
    # log(p/q) = ln 2, -ln 2, 0. k2 is half its square. k3 with q/p = 1/2, 2, 1: q/p - 1 + log(p/q).
    ln2 = math.log(2)
    expected = {
        "k1": [ln2, -ln2, 0.0],
        "k2": [ln2 * ln2 / 2, ln2 * ln2 / 2, 0.0],
        "k3": [0.5 - 1 + ln2, 2 - 1 - ln2, 0.0],
    }
    for kind in KINDS:
        assert estimate(P_V, Q_V, kind).tolist() == pytest.approx(expected[kind], abs=1e-15)


def test_mean_and_variance_over_the_whole_distribution() -> None:
    mean, variance = {}, {}
    for kind in KINDS:
        mean[kind], variance[kind] = moments(P_V, estimate(P_V, Q_V, kind))
    assert mean["k1"] == pytest.approx(EXACT, abs=1e-15)
    assert mean["k3"] == pytest.approx(EXACT, abs=1e-15)
    # k2 = ln(2)^2 / 2 on three quarters of the mass: 0.375 ln(2)^2 = 0.180, where the KL is 0.173.
    assert mean["k2"] == pytest.approx(0.375 * math.log(2) ** 2, abs=1e-15)
    assert mean["k2"] > EXACT
    # k1: E[k1^2] - KL^2 = 0.75 ln(2)^2 - (0.25 ln 2)^2 = 0.6875 ln(2)^2.
    assert variance["k1"] == pytest.approx(0.6875 * math.log(2) ** 2, abs=1e-15)
    assert variance["k3"] < variance["k1"] / 10 and variance["k2"] < variance["k1"] / 10


def test_mean_and_variance_of_samples() -> None:
    draws = 100_000
    token_T = torch.multinomial(P_V, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        exact_mean, exact_variance = moments(P_V, estimate(P_V, Q_V, kind))
        sampled_BT = kl_estimate(P_V.log()[token_T][None], Q_V.log()[token_T][None], kind)
        assert sampled_BT.mean().item() == pytest.approx(exact_mean, abs=5 * (exact_variance / draws) ** 0.5)
        assert sampled_BT.var().item() == pytest.approx(exact_variance, rel=0.02)


@pytest.mark.parametrize(
    ("shift", "kind", "bias", "deviation"),
    # Schulman 2020: bias and standard deviation, over the true KL, for p = N(0, 1) and q = N(shift, 1).
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.002, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.7),
    ],
)
def test_schulmans_table(shift: float, kind: Estimator, bias: float, deviation: float) -> None:
    x_V = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    mass_V = torch.exp(-x_V.square() / 2)
    mass_V = mass_V / mass_V.sum()
    value_V = kl_estimate(-x_V.square()[None] / 2, -(x_V - shift).square()[None] / 2, kind)[0]
    mean, variance = moments(mass_V, value_V)
    true = shift**2 / 2
    assert mean / true - 1 == pytest.approx(bias, abs=0.001)
    assert variance**0.5 / true == pytest.approx(deviation, rel=0.012)


def test_what_each_gradient_pursues() -> None:
    """In the mean over the policy's samples: k1's is 0, k2's is that of KL(p || q), k3's that of KL(q || p)."""

    def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
        logit_V = P_V.log().requires_grad_()
        (gradient_V,) = torch.autograd.grad(objective(logit_V.log_softmax(0)), logit_V)
        return gradient_V

    def in_the_mean(kind: Estimator) -> Tensor:
        return gradient(lambda logp_V: (P_V * kl_estimate(logp_V[None], Q_V.log()[None], kind)[0]).sum())

    reverse_V = gradient(lambda logp_V: (logp_V.exp() * (logp_V - Q_V.log())).sum())
    forward_V = gradient(lambda logp_V: (Q_V * (Q_V.log() - logp_V)).sum())
    torch.testing.assert_close(in_the_mean("k1"), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(in_the_mean("k2"), reverse_V, rtol=0, atol=1e-15)
    torch.testing.assert_close(in_the_mean("k3"), forward_V, rtol=0, atol=1e-15)
    assert not torch.allclose(reverse_V, forward_V)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind: Estimator) -> None:
    generator = torch.Generator().manual_seed(1)
    policy_BT, reference_BT = (
        torch.randn(2, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda p, q: kl_estimate(p, q, kind), (policy_BT, reference_BT))


def test_k3_is_finite_where_the_models_have_nothing_in_common() -> None:
    policy_BT = torch.tensor([[-200.0, -1.0, -20.0]], requires_grad=True)
    kl_BT = kl_estimate(policy_BT, torch.tensor([[-1.0, -200.0, -1.0]]), "k3")
    # Clamped at 20 from above: e^20 - 21. From below it is linear: -199 gives 0 - 1 + 199. 19 is inside: e^19 - 20.
    expected_BT = torch.tensor([[math.exp(MAX_LOG_RATIO) - 21, 198.0, math.exp(19) - 20]])
    torch.testing.assert_close(kl_BT, expected_BT, rtol=1e-6, atol=0)
    # d/dp (q/p - 1 - log(q/p)) = 1 - q/p, and none past the clamp.
    (gradient_BT,) = torch.autograd.grad(kl_BT.sum(), policy_BT)
    torch.testing.assert_close(gradient_BT, torch.tensor([[0.0, 1.0, 1 - math.exp(19)]]), rtol=1e-6, atol=0)


def test_k3_keeps_the_digits_of_a_small_ratio() -> None:
    # For d = 2^-12, k3 = d^2/2 + d^3/6 + ... = 2.98047e-8; exp(d) - 1 - d in float32 gives 0.
    d = 2.0**-12
    kl = kl_estimate(torch.zeros(1, 1), torch.full((1, 1), d), "k3").item()
    assert kl == pytest.approx(d * d / 2 + d**3 / 6, rel=2e-3)
    assert kl_estimate(torch.zeros(1, 1), torch.full((1, 1), -d), "k3").item() > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="kl='k4' is not an estimator; use one of k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"reference_logp_BT is \(1, 2\)"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 2), "k3")
    with pytest.raises(AssertionError, match=r"must be \[B, T\]"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k3")
