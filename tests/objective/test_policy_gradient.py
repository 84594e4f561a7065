"""Beside the clipped surrogate of test_losses.py: an advantage a token, GSPO's ratio, the plain gradient."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective.losses import clipped_surrogate, reinforce, sequence_clipped_surrogate
from aligner.objective.reduction import token_weights

F64 = torch.float64
LOSSES = (clipped_surrogate, sequence_clipped_surrogate, reinforce)
MASK_BT = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


def random_batch(seed: int, mask_BT: Tensor, loss: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    rollout_BT = -1 - normal(*mask_BT.shape).abs()
    batch = {
        "policy_logp_BT": (rollout_BT + 0.5 * normal(*mask_BT.shape)).requires_grad_(),
        "reference_logp_BT": rollout_BT + 0.5 * normal(*mask_BT.shape),
        "entropy_BT": normal(*mask_BT.shape).abs().requires_grad_(),
        "advantage_B": normal(len(mask_BT)),
        "mask_BT": mask_BT,
        "kl_coef": 0.3,
        "entropy_coef": 0.2,
        "kl": "k2",
    }
    return batch if loss is reinforce else batch | {"rollout_logp_BT": rollout_BT}


# --- GSPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient", "clipped"),
    # Log-ratios ln 2, ln 4.5 over two tokens: s = sqrt(9) = 3, where one token's ratio alone is 2.
    [
        (0.5, -0.55, 0.0, 1),  # min(3, 1.1) A
        (-0.5, 1.5, 1.5, 0),  # pushed back down, without a bound: -s A, and its derivative by each token's log p
        (0.0, 0.0, 0.0, 0),
    ],
)
def test_the_ratio_of_a_sequence_by_hand(advantage: float, loss: float, gradient: float, clipped: int) -> None:
    policy_BT = torch.tensor([[0.0, -1 + math.log(2), math.nan, -2 + math.log(4.5)]], dtype=F64, requires_grad=True)
    loss_BT, metrics = sequence_clipped_surrogate(
        policy_BT,
        rollout_logp_BT=torch.tensor([[math.nan, -1.0, 5.0, -2.0]], dtype=F64),
        advantage_B=torch.tensor([advantage], dtype=F64),
        mask_BT=torch.tensor([[False, True, False, True]]),
        clip_low=0.2,
        clip_high=0.1,
    )
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), policy_BT)
    assert loss_BT[0].tolist() == pytest.approx([0, loss, 0, loss], abs=1e-14)
    assert gradient_BT[0].tolist() == pytest.approx([0, gradient, 0, gradient], abs=1e-14)
    assert metrics["ratio"][0].tolist() == pytest.approx([0, 3, 0, 3], abs=1e-14)
    assert metrics["clip_fraction"][0].tolist() == [0, clipped, 0, clipped]
    assert metrics["gap"][0].tolist() == pytest.approx([0, math.log(2), 0, math.log(4.5)], abs=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_under_sequence_mean_it_is_the_papers_objective(seed: int) -> None:
    """Equation 5 with its ratio in one piece, differentiated as it stands, has the token form's value and gradient."""
    batch = random_batch(seed, MASK_BT, sequence_clipped_surrogate) | {"kl_coef": 0.0, "entropy_coef": 0.0}
    logp_BT, rollout_BT, advantage_B = (batch[n] for n in ("policy_logp_BT", "rollout_logp_BT", "advantage_B"))
    terms = []
    for b in range(2):
        tokens = MASK_BT[b].nonzero().flatten()
        s = torch.exp((logp_BT[b, tokens] - rollout_BT[b, tokens]).mean())
        terms.append(torch.min(s * advantage_B[b], s.clamp(0.9, 1.1) * advantage_B[b]))
    expected = -torch.stack(terms).sum() / 2
    loss_BT, _ = sequence_clipped_surrogate(**batch, clip_low=0.1, clip_high=0.1)
    actual = (loss_BT * token_weights(MASK_BT, "sequence_mean", total_tokens=5, total_rows=2, dtype=F64)).sum()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(loss, logp_BT)[0] for loss in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-14)


def test_float32_resolves_the_papers_clip() -> None:
    """4,000 tokens of which each is 3.5e-4 more likely, at log-probabilities around -10: past 3e-4, short of 4e-4."""
    rollout_BT = -10 - torch.rand(1, 4000, generator=torch.Generator().manual_seed(0), dtype=F64)
    inputs = {"rollout_logp_BT": rollout_BT.float(), "mask_BT": torch.ones(1, 4000, dtype=torch.bool)}
    policy_BT = (rollout_BT + math.log1p(3.5e-4)).float()
    for advantage, clip_high, clipped in ((1.0, 4e-4, 0.0), (1.0, 3e-4, 1.0)):
        _, metrics = sequence_clipped_surrogate(
            policy_BT, **inputs, advantage_B=torch.tensor([advantage]), clip_high=clip_high
        )
        assert metrics["clip_fraction"].unique().tolist() == [clipped]
        assert metrics["ratio"][0, 0].item() == pytest.approx(1 + 3.5e-4, abs=1e-7)


def test_a_sequence_that_has_nothing_in_common_is_finite() -> None:
    loss_BT, _ = sequence_clipped_surrogate(
        torch.full((2, 3), -1.0), rollout_logp_BT=torch.full((2, 3), -101.0),
        advantage_B=torch.tensor([0.0, -1.0]), mask_BT=torch.ones(2, 3, dtype=torch.bool),
    )  # fmt: skip
    assert not loss_BT[0].any() and loss_BT[1].tolist() == pytest.approx([math.exp(20)] * 3, rel=1e-6)


# --- the plain gradient --------------------------------------------------------------------------------------------


def test_reinforce_by_hand() -> None:
    policy_BT = torch.tensor([[-1.0, -2.0, math.nan]], dtype=F64, requires_grad=True)
    mask_BT = ~policy_BT.isnan()
    loss_BT, _ = reinforce(policy_BT, mask_BT=mask_BT, advantage_B=torch.tensor([3.0], dtype=F64))
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), policy_BT)
    assert loss_BT.tolist() == [[3.0, 6.0, 0.0]] and gradient_BT.tolist() == [[-3.0, -3.0, 0.0]]
    # k2 of log-ratios 1 and -2: 1/2 and 2; its derivatives 1 and -2.
    loss_BT, metrics = reinforce(
        policy_BT, mask_BT=mask_BT, advantage_BT=torch.tensor([[3.0, -1.0, math.inf]], dtype=F64),
        reference_logp_BT=torch.tensor([[-2.0, 0.0, 0.0]], dtype=F64), kl_coef=0.5,
    )  # fmt: skip
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), policy_BT)
    assert loss_BT.tolist() == [[3.25, -1.0, 0.0]] and gradient_BT.tolist() == [[-2.5, 0.0, 0.0]]
    assert metrics["kl"].tolist() == [[0.5, 2.0, 0.0]]


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_an_advantage_a_row_is_the_same_on_every_token(loss: Any) -> None:
    batch = random_batch(0, MASK_BT, loss)
    by_row_BT, _ = loss(**batch)
    advantage_B = batch.pop("advantage_B")
    by_token_BT, _ = loss(**batch, advantage_BT=advantage_B[:, None].expand(3, 5))
    assert torch.equal(by_row_BT, by_token_BT)
    # Doubling one token's advantage changes its loss and no other's.
    advantage_BT = advantage_B[:, None].repeat(1, 5)
    advantage_BT[0, 2] *= 2
    changed_BT, _ = loss(**batch, advantage_BT=advantage_BT)
    assert (changed_BT != by_row_BT).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("both", [False, True])
def test_exactly_one_advantage(loss: Any, both: bool) -> None:
    batch = random_batch(0, MASK_BT, loss)
    wrong = {"advantage_BT": torch.zeros(3, 5)} if both else {"advantage_B": None}
    with pytest.raises(ValueError, match=r"exactly one of advantage_B \(one per row\) and advantage_BT"):
        loss(**{**batch, **wrong})
    with pytest.raises(AssertionError, match="advantage_BT is"):
        loss(**{**batch, "advantage_B": None, "advantage_BT": torch.zeros(3, 4)})


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_leaks_from_outside_the_mask(loss: Any, garbage: float) -> None:
    clean = random_batch(0, MASK_BT, loss)
    clean["advantage_BT"] = clean.pop("advantage_B")[:, None].repeat(1, 5)
    dirty = dict(clean)
    for name, value in clean.items():
        if isinstance(value, Tensor) and name != "mask_BT":
            dirty[name] = value.detach().masked_fill(~MASK_BT, garbage).requires_grad_(value.requires_grad)
    results = []
    for batch in (clean, dirty):
        loss_BT, metrics = loss(**batch)
        gradients = torch.autograd.grad(loss_BT.sum(), (batch["policy_logp_BT"], batch["entropy_BT"]))
        results.append({"loss": loss_BT, "dlogp": gradients[0], "dentropy": gradients[1], **metrics})
    for name, value_BT in results[1].items():
        assert torch.equal(value_BT, results[0][name]) and not value_BT[~MASK_BT].any(), name


@settings(deadline=None, max_examples=60)
@given(data=st.data(), which=st.sampled_from(range(3)), rows=st.integers(1, 8), length=st.integers(1, 6))
def test_a_row_is_the_same_in_any_shard_and_under_any_padding(
    data: st.DataObject, which: int, rows: int, length: int
) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    batch = random_batch(data.draw(st.integers(0, 999)), torch.tensor(bits).view(rows, length), LOSSES[which])
    whole_BT, _ = LOSSES[which](**batch)
    mine_B = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    part = {name: value[mine_B] if isinstance(value, Tensor) else value for name, value in batch.items()}
    wide = {
        name: torch.nn.functional.pad(value, (0, 3)) if isinstance(value, Tensor) and value.ndim == 2 else value
        for name, value in part.items()
    }
    torch.testing.assert_close(LOSSES[which](**part)[0], whole_BT[mine_B], rtol=0, atol=1e-13)
    torch.testing.assert_close(LOSSES[which](**wide)[0][:, :length], whole_BT[mine_B], rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_reinforce_gradients_against_finite_differences(seed: int) -> None:
    batch = random_batch(seed, MASK_BT, reinforce)

    def loss(policy_logp_BT: Tensor, entropy_BT: Tensor) -> Tensor:
        return reinforce(**{**batch, "policy_logp_BT": policy_logp_BT, "entropy_BT": entropy_BT})[0]

    assert torch.autograd.gradcheck(loss, (batch["policy_logp_BT"], batch["entropy_BT"]))


def test_mistakes_are_named() -> None:
    batch = random_batch(0, MASK_BT, sequence_clipped_surrogate)
    for wrong, message in (
        ({"clip_low": 1.5}, r"clip_low=1.5 must lie in \[0, 1\]"),
        ({"reference_logp_BT": None}, r"kl_coef=0.3 needs reference_logp_BT"),
        ({"kl": "k1"}, r"kl=k1 with kl_coef=0.3 regularises nothing"),
        ({"entropy_BT": None}, r"entropy_coef=0.2 needs entropy_BT"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_clipped_surrogate(**{**batch, **wrong})
