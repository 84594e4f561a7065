"""Every loss on what must not matter (whatever stands outside the mask) and on what is extreme: -inf, huge ratios, nothing.

The losses are found by their signature, so that a new one is tried as well.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective import losses, off_policy, preference, reward_model, values
from aligner.objective.advantages import (
    greedy_baseline_advantages,
    group_advantages,
    has_signal,
    leave_one_out_advantages,
    reinforce_pp_advantages,
)
from aligner.objective.kl import Estimator, kl_estimate
from aligner.objective.moments import Moments, mean_and_std, row_moments, whiten
from aligner.objective.off_policy import importance_weights
from aligner.objective.reduction import token_weights
from aligner.objective.shaping import overlong_penalty, running_scale
from aligner.objective.token_rewards import kl_penalized, kl_rewards, returns_to_go
from aligner.objective.values import gae

F32, F64 = torch.float32, torch.float64
GARBAGE = (math.nan, math.inf, -math.inf, 3e38, -3e38)
MODULES = (losses, off_policy, preference, reward_model, values)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "clipped_surrogate": [{}, {"kl_coef": 0.1, "entropy_coef": 0.1, "dual_clip": 3.0}, {"clip_high": math.inf}],
    "sequence_clipped_surrogate": [{}, {"kl_coef": 0.1, "kl": "k2"}],
    "reinforce": [{}, {"kl_coef": 0.1}],
    "decoupled_surrogate": [
        {}, {"level": "sequence"}, {"correction": "mask", "weight_low": 0.5}, {"correction": "none", "kl_coef": 0.1},
        {"weight_high": math.inf, "dual_clip": 3.0}, {"proximal_logp_BT": None},
    ],
    "dpo": [{}, {"label_smoothing": 0.1}, {"log_ratio": "token_mean", "nll_coef": 0.5}],
    "robust_dpo": [{}, {"label_smoothing": 0.0}],
    "ipo": [{}, {"log_ratio": "sum"}],
    "simpo": [{}, {"label_smoothing": 0.1, "nll_coef": 0.5}],
    "bradley_terry": [{}, {"centre_coef": 0.01}],
    "clipped_value_loss": [{}, {"clip": math.inf}],
}  # fmt: skip
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def public_losses() -> Iterator[tuple[str, Loss]]:
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            told = str(inspect.signature(function).return_annotation)
            if function.__module__ == module.__name__ and not name.startswith("_") and "dict[" in told:
                yield name, function


CASES = [
    pytest.param(functools.partial(function, **variant), id=f"{name} {variant}")
    for name, function in public_losses()
    for variant in VARIANTS.get(name, [{}])
]


class Batch:
    """Six rows of up to seven tokens with every input that a loss may name; some rows, or all, have nothing trained."""

    def __init__(self, seed: int, dtype: torch.dtype, share: float = 0.6) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.generator = generator
        self.mask_BT = torch.rand(6, 7, generator=generator) < share
        self.mask_BT[torch.rand(6, generator=generator) < 0.2] = False
        rollout_BT = -1 - normal(6, 7).abs()
        self.fields: dict[str, Any] = {
            "policy_logp_BT": rollout_BT + 0.3 * normal(6, 7),
            "rollout_logp_BT": rollout_BT,
            "proximal_logp_BT": rollout_BT + 0.2 * normal(6, 7),
            "reference_logp_BT": rollout_BT + 0.3 * normal(6, 7),
            "entropy_BT": normal(6, 7).abs(),
            "value_BT": normal(6, 7),
            "rollout_value_BT": normal(6, 7),
            "return_BT": normal(6, 7),
            "advantage_B": normal(6),
            "reference_sum_B": -5 - normal(6),
            "score_B": normal(6),
            "margin_B": normal(3).abs().repeat_interleave(2),
            "label_B": normal(6),
        }
        self.fields["advantage_B"][0] = 0.0
        self.fields = {name: value.to(dtype) for name, value in self.fields.items()}

    def outside(self) -> dict[str, Any]:
        """The same with garbage outside the mask, in rows without a trained token, and in pairs with such a row."""
        found = dict(self.fields)
        for name, value in found.items():
            if isinstance(value, Tensor):
                at = ~self.mask_BT if value.dim() == 2 else ~self.mask_BT.any(1)
                if name in ("score_B", "margin_B"):
                    at = at.view(-1, 2).any(1).repeat_interleave(2)
                drawn = torch.randint(len(GARBAGE), value.shape, generator=self.generator)
                found[name] = torch.where(at, torch.tensor(GARBAGE, dtype=value.dtype)[drawn], value)
        return found

    def impossible(self, names: list[str], token: float, speed: int | None = None) -> dict[str, Any]:
        """The same where a quarter of the tokens of `names` have a log-probability of `token`, or, with a `speed`, of up
        to a thousand times as much, drawn for each; in the first rows of the pairs only."""
        found = dict(self.fields)
        at_BT = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.25
        at_BT[1::2] = False
        generator = torch.Generator().manual_seed(speed or 0)
        for number, name in enumerate(names):
            value = found[name]
            at = torch.arange(6) == 2 if value.dim() == 1 else at_BT.roll(number // 2, 1)
            times = 1.0 if speed is None else 10 ** (3 * torch.rand(value.shape, generator=generator, dtype=F64))
            found[name] = torch.where(at, torch.as_tensor(token * times, dtype=value.dtype), value)
        return found


def evaluated(loss: Any, mask_BT: Tensor, fields: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss, metrics, gradient by the first argument)."""
    parameters = inspect.signature(loss).parameters
    bound = getattr(loss, "keywords", {})
    first = next(iter(parameters))
    leaf = fields[first].clone().requires_grad_()
    given = {name: value for name, value in fields.items() if name in parameters and name not in bound}
    if "label_B" in given:  # KTO's, a number; elsewhere it is the name of an estimator
        given["kl"] = 0.3
    value, metrics = loss(**given | {first: leaf, "mask_BT": mask_BT})
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), metrics, gradient


def test_the_losses_are_found() -> None:
    assert {name for name, _ in public_losses()} == {
        "clipped_surrogate", "sequence_clipped_surrogate", "reinforce", "negative_log_likelihood", "decoupled_surrogate",
        "dpo", "robust_dpo", "ipo", "orpo", "simpo", "kto", "bradley_terry", "clipped_value_loss",
    }  # fmt: skip


@pytest.mark.parametrize("loss", CASES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.2, 0.6, 1.0]), dtype=st.sampled_from([F32, F64]))
def test_what_is_outside_the_mask_reaches_nothing(loss: Any, seed: int, share: float, dtype: torch.dtype) -> None:
    batch = Batch(seed, dtype, share)
    value, metrics, gradient = evaluated(loss, batch.mask_BT, batch.fields)
    got, got_metrics, got_gradient = evaluated(loss, batch.mask_BT, batch.outside())
    assert torch.equal(got, value) and torch.equal(got_gradient, gradient)
    assert got.isfinite().all() and got_gradient.isfinite().all()
    at = batch.mask_BT if gradient.dim() == 2 else batch.mask_BT.any(1)
    assert not got_gradient[~at].any()
    if value.shape == at.shape:
        assert not got[~at].any()
    for name, wanted in metrics.items():
        assert torch.equal(got_metrics[name], wanted), name


LOGPS = ["policy_logp_BT", "rollout_logp_BT", "proximal_logp_BT", "reference_logp_BT", "reference_sum_B"]


@pytest.mark.parametrize("loss", [case for case in CASES if "policy_logp_BT" in inspect.signature(case.values[0]).parameters])  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), names=st.lists(st.sampled_from(LOGPS), min_size=1, unique=True))
def test_impossible_tokens(loss: Any, seed: int, names: list[str]) -> None:
    """What -inf gives is what ever less likely tokens come to, where that is a number and the same however they get
    there (two that race to the bottom of a sum have no limit); it is never NaN, and a finite loss has a finite gradient."""
    batch = Batch(seed, F64)
    value, metrics, gradient = evaluated(loss, batch.mask_BT, batch.impossible(names, -math.inf))
    ways = [(-1e7, None), *((-1e8, speed) for speed in (None, 1, 2, 3, 4, 5, 6))]
    limits = torch.stack([evaluated(loss, batch.mask_BT, batch.impossible(names, *way))[0] for way in ways])
    settled = (limits - limits[0]).abs().amax(0) < 1e-9
    if len(names) == 1 or "reference_sum_B" not in inspect.signature(loss).parameters:
        torch.testing.assert_close(value[settled], limits[1][settled], rtol=1e-9, atol=1e-9)
    assert not value[limits[1].abs() < 1e6].isnan().any()
    assert not any(metric.isnan().any() for metric in metrics.values())
    finite_B = value.isfinite() if value.dim() == 1 else value.isfinite().all(1)
    assert gradient[finite_B].isfinite().all()


def test_impossible_tokens_by_hand() -> None:
    never, mask_BT = torch.tensor([[-math.inf, -1.0]], dtype=F64), torch.ones(1, 2, dtype=torch.bool)
    rollout_BT = torch.tensor([[-1.0, -1.0]], dtype=F64)
    for advantage, wanted in ((1.0, 0.0), (-1.0, 1 - 3e-4)):  # s = 0: min(0, ...) and the clip at 1 - 3e-4
        found, _, gradient = evaluated(
            losses.sequence_clipped_surrogate,
            mask_BT,
            {"policy_logp_BT": never, "rollout_logp_BT": rollout_BT, "advantage_B": torch.tensor([advantage])},
        )
        assert found.tolist() == [[pytest.approx(wanted)] * 2] and gradient.tolist() == [[0.0, 0.0]]
    found, _, gradient = evaluated(
        off_policy.decoupled_surrogate,
        mask_BT,
        {"policy_logp_BT": never, "rollout_logp_BT": rollout_BT, "advantage_B": torch.tensor([2.0])},
    )
    assert found.tolist() == [[0.0, -2.0]] and gradient.tolist() == [[0.0, -2.0]]  # weights of 0 and 1
    pair = {"policy_logp_BT": torch.cat([rollout_BT, never]), "reference_sum_B": torch.tensor([-2.0, -2.0])}
    both_BT = torch.ones(2, 2, dtype=torch.bool)
    for loss in (preference.dpo, preference.simpo, preference.robust_dpo):
        smooth = {"label_smoothing": 0.0} if loss is preference.robust_dpo else {}
        found, metrics, gradient = evaluated(functools.partial(loss, **smooth), both_BT, pair)
        # told apart for certain: nothing is left to pay, nothing to learn
        assert found.tolist() == [0.0, 0.0] and not gradient.any() and metrics["pair_accuracy"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("loss", CASES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([F32, F64]))
def test_far_apart(loss: Any, seed: int, dtype: torch.dtype) -> None:
    """Log-probabilities thousands of nats apart: every exponential would overflow, no loss does."""
    batch = Batch(seed, dtype)
    for number, name in enumerate(LOGPS[:4]):
        scale = (3000.0, 1.0, 5000.0, 2000.0)[(seed + number) % 4]
        batch.fields[name] = batch.fields[name] * scale
    value, metrics, gradient = evaluated(loss, batch.mask_BT, batch.fields)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert all(metric.isfinite().all() for metric in metrics.values())


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.parametrize("width", [0, 3])
def test_rows_of_nothing(loss: Any, width: int) -> None:
    """Responses without a token, or without a trained one."""
    fields = {
        name: value[:, :width] if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in Batch(0, F32).fields.items()
    }
    value, metrics, gradient = evaluated(loss, torch.zeros(6, width, dtype=torch.bool), fields)
    assert not value.any() and not gradient.any()
    assert not any(metric.any() for metric in metrics.values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_of_impossible_tokens(kind: Estimator) -> None:
    policy_BT = torch.tensor([[-math.inf, -math.inf, -1.0]], requires_grad=True)
    reference_BT = torch.tensor([[-math.inf, -1.0, -math.inf]])
    kl_BT = kl_estimate(policy_BT, reference_BT, kind)
    alike_BT = kl_estimate(policy_BT[:, :1], reference_BT[:, :1], kind)
    (gradient,) = torch.autograd.grad(alike_BT.sum(), policy_BT)
    assert alike_BT.item() == kl_BT[0, 0].item() == 0.0 and not gradient.any()
    assert kl_BT[0, 2].item() == math.inf and not kl_BT.isnan().any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_token_functions_see_nothing_outside_the_mask(seed: int, share: float) -> None:
    batch = Batch(seed, F64, share)
    mask_BT, clean, dirty = batch.mask_BT, batch.fields, batch.outside()

    def of(fields: dict[str, Any]) -> Iterator[Tensor]:
        yield from gae(fields["return_BT"], fields["value_BT"], mask_BT)
        yield returns_to_go(fields["return_BT"], mask_BT)
        yield reinforce_pp_advantages(fields["return_BT"], mask_BT)
        logps = {"policy_logp_BT": fields["policy_logp_BT"], "reference_logp_BT": fields["reference_logp_BT"]}
        yield kl_rewards(clean["advantage_B"], mask_BT=mask_BT, kl_coef=0.1, **logps)
        yield kl_penalized(clean["advantage_B"], mask_BT=mask_BT, kl_coef=0.1, **logps)
        moments_B3 = row_moments(fields["value_BT"], mask_BT)
        yield moments_B3
        mean, std = mean_and_std(moments_B3)
        yield whiten(fields["value_BT"], mask_BT, mean=mean, std=std)
        for level in ("token", "sequence"):
            yield importance_weights(fields["proximal_logp_BT"], fields["rollout_logp_BT"], mask_BT, level=level)  # type: ignore[arg-type]

    for wanted, got in zip(of(clean), of(dirty), strict=True):
        assert torch.equal(got, wanted) and got.isfinite().all()


@pytest.mark.parametrize("width", [0, 3])
def test_token_functions_of_nothing(width: int) -> None:
    mask_BT, value_BT = torch.zeros(4, width, dtype=torch.bool), torch.full((4, width), math.nan)
    reward_B = torch.tensor([1.0, math.nan, 0.0, 2.0])
    assert not any(part.any() for part in gae(value_BT, value_BT, mask_BT))
    assert not kl_rewards(reward_B, mask_BT=mask_BT, policy_logp_BT=value_BT).any()
    assert mean_and_std(row_moments(value_BT, mask_BT)) == (0.0, 0.0)
    assert not whiten(value_BT, mask_BT, mean=0.0, std=0.0).any()
    for kind in ("token_mean", "sequence_mean", "fixed"):
        weight_BT = token_weights(mask_BT, kind, total_tokens=0, total_rows=0, fixed_length=4)  # type: ignore[arg-type]
        assert weight_BT.shape == (4, width) and not weight_BT.any()
    assert not kl_penalized(
        torch.zeros(4), mask_BT=mask_BT, policy_logp_BT=value_BT, reference_logp_BT=value_BT, kl_coef=0.1
    ).any()


def test_a_penalty_that_costs_nothing_leaves_an_infinite_kl_out() -> None:
    reward_B, mask_BT = torch.tensor([3.0]), torch.ones(1, 1, dtype=torch.bool)
    logps = {"policy_logp_BT": torch.tensor([[-1.0]]), "reference_logp_BT": torch.tensor([[-math.inf]])}
    assert kl_penalized(reward_B, mask_BT=mask_BT, kl_coef=0.0, **logps).tolist() == [3.0]
    assert kl_rewards(reward_B, mask_BT=mask_BT, kl_coef=0.0, **logps).tolist() == [[3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32, F64])
@pytest.mark.parametrize(
    "advantages",
    [group_advantages, functools.partial(group_advantages, normalize="none"), leave_one_out_advantages, has_signal],
)
def test_groups_with_nothing_to_compare(advantages: Any, dtype: torch.dtype) -> None:
    """Of one row, of equal rewards (0.1 and 1e30 round), without a reward, with one reward; and no group at all."""
    nan = math.nan
    for rewards, size in (
        ([0.1, 1e30, -2.0], 1), ([0.1] * 4 + [1e30] * 4, 4), ([nan] * 4, 2), ([nan, nan, 3.0, nan], 4), ([], 4), ([], 1),
    ):  # fmt: skip
        found = advantages(torch.tensor(rewards, dtype=dtype), group_size=size)
        assert found.shape == (len(rewards),) and not found.any()
        assert found.dtype == (torch.bool if advantages is has_signal else dtype)


def test_shaping_of_nothing_and_of_equal_rewards() -> None:
    assert overlong_penalty(torch.tensor([], dtype=torch.long), max_length=8).tolist() == []
    assert overlong_penalty(torch.tensor([0, 1]), max_length=1, buffer=1).tolist() == [0.0, -1.0]
    state, scale = running_scale(Moments(), torch.tensor([math.nan, math.nan]))
    assert state == Moments() and scale == 1.0
    state, scale = running_scale(state, torch.tensor([0.1, math.nan, 0.1]))
    assert state.n == 2 and scale == 1.0
    none = torch.tensor([])
    assert greedy_baseline_advantages(none, none).tolist() == []
