"""What conf/algorithm calls published is its paper's equation: from the composed settings to the loss and its gradient,
against the equation written out response by response, without masks, padding or batches, in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hydra.utils import get_method
from torch import Tensor

from aligner.algorithms.grpo import shape_rewards
from aligner.algorithms.ppo import estimate, token_rewards
from aligner.algorithms.reinforce_pp import token_advantages
from aligner.check.loop_settings import settings_of
from aligner.config.help import comment_of, help_text
from aligner.config.schema import CONF, Config, compose_config, to_config
from aligner.data.samples import Samples
from aligner.objective.masked import row_sums
from aligner.objective.moments import mean_and_std, row_moments, whiten
from aligner.trainer.loss_mean import Totals, counted, global_mean
from tests.algorithms.methods import methods
from tests.algorithms.test_configs import DATA

F64 = torch.float64
LENGTHS = [4, 1, 6, 3, 2, 5, 6, 2]
"""Tokens of the responses: two groups of 4, or 4 pairs."""
PROMPT, WIDTH = 2, 2 + max(LENGTHS)
LONGEST = 7
"""sampling.max_tokens."""
Rows = list[Tensor]


class Batch:
    """Responses as lists of numbers, and the same padded as `Samples`."""

    def __init__(self, seed: int, apart: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rows(scale: float, start: Rows | None = None) -> Rows:
            drawn = [scale * torch.randn(n, generator=generator, dtype=F64) for n in LENGTHS]
            return drawn if start is None else [a + b for a, b in zip(start, drawn, strict=True)]

        self.rollout = [-1 - row.abs() for row in rows(1.0)]
        self.policy = [row.requires_grad_() for row in rows(apart, self.rollout)]
        self.reference = rows(0.4, self.rollout)
        self.value, self.value_now = rows(1.0), [row.requires_grad_() for row in rows(1.0)]
        self.reward = torch.randn(len(LENGTHS), generator=generator, dtype=F64).tolist()
        self.score = torch.randn(len(LENGTHS), generator=generator, dtype=F64)
        length_B = torch.tensor(LENGTHS) + PROMPT
        place_T = torch.arange(WIDTH)
        self.mask_BT = (place_T >= PROMPT) & (place_T < length_B[:, None])
        self.samples = Samples(
            tokens_BT=torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long),
            prompt_len_B=torch.full((len(LENGTHS),), PROMPT), length_B=length_B, mask_BT=self.mask_BT,
            prompt_index_B=torch.arange(len(LENGTHS)), fields=[{}] * len(LENGTHS), rollout_logp_BT=padded(self.rollout),
        )  # fmt: skip

    @property
    def reward_B(self) -> Tensor:
        return torch.tensor(self.reward, dtype=F64)


def padded(rows: Rows) -> Tensor:
    return torch.stack(
        [torch.nn.functional.pad(row, (PROMPT, WIDTH - PROMPT - len(row)), value=math.nan) for row in rows]
    )


@functools.cache
def composed(method: str, *overrides: str) -> tuple[Config, Any]:
    """(configuration, the loop's settings)."""
    data, small = DATA.get(method, "prompts"), [f"sampling.max_tokens={LONGEST}"]
    config = to_config(compose_config(["model.path=x", f"algorithm={method}", f"data={data}", *small, *overrides]))
    algorithm = dict(config.algorithm)
    return config, settings_of(get_method(algorithm.pop("_target_")), algorithm)


def ours(config: Any, loss: Callable[..., Any], leaf: Rows, batch: Batch, **fields: Any) -> Tensor:
    """The mean that an optimizer step minimises, as `update` takes it; `config` is the role's."""
    mask_BT = counted(loss, batch.mask_BT, fields)
    totals = Totals(float(mask_BT.sum()), float(mask_BT.any(1).sum()))
    unreduced, _ = loss(padded(leaf), mask_BT=mask_BT, **fields)
    return global_mean(unreduced, mask_BT, totals, config, LONGEST)


def same(found: Tensor, wanted: Tensor, leaf: Rows) -> None:
    """Values and gradients; every response of `leaf` has one."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    gradients = [torch.cat(torch.autograd.grad(loss, leaf)) for loss in (found, wanted)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def clipped(ratio: Tensor, advantage: Any, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def standardized(reward: list[float], size: int = 4) -> list[float]:
    groups = [reward[first : first + size] for first in range(0, len(reward), size)]
    return [(r - fmean(group)) / (stdev(group) + 1e-4) for group in groups for r in group]


def centered(reward: list[float], size: int = 4) -> list[float]:
    return [r - fmean(reward[i // size * size : i // size * size + size]) for i, r in enumerate(reward)]


def advantages(settings: Any, batch: Batch, reference: Tensor | None = None) -> Tensor:
    """As the loop has them."""
    penalty, kl_coef = settings.length_penalty, settings.reward_kl_coef
    reward_B = shape_rewards(batch.samples, batch.reward_B, reference, penalty, kl_coef)
    found: Tensor = settings.advantages(reward_B, group_size=4)
    return found


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
def test_grpo(seed: int) -> None:
    """Shao et al. 2024, equations 3 and 4."""
    config, settings = composed("grpo_paper")
    batch = Batch(seed)
    advantage = standardized(batch.reward)
    wanted = torch.zeros((), dtype=F64)
    for p, old, q, a in zip(batch.policy, batch.rollout, batch.reference, advantage, strict=True):
        kl = (q - p).exp() - (q - p) - 1
        wanted = wanted + (clipped((p - old).exp(), a, 0.2, 0.2) - 0.04 * kl).sum() / len(p)
    given = {"rollout_logp_BT": padded(batch.rollout), "reference_logp_BT": padded(batch.reference)}
    found = ours(config.policy, settings.loss, batch.policy, batch, advantage_B=advantages(settings, batch), **given)
    same(found, -wanted / len(LENGTHS), batch.policy)
    assert settings.group_size == 64 and config.policy.epochs * config.policy.minibatches == 1


@SEEDS
def test_dr_grpo(seed: int) -> None:
    """Liu et al. 2025: neither deviation nor length; divided by a constant."""
    config, settings = composed("dr_grpo")
    batch = Batch(seed)
    terms = [
        clipped((p - old).exp(), a, 0.2, 0.2).sum()
        for p, old, a in zip(batch.policy, batch.rollout, centered(batch.reward), strict=True)
    ]
    found = ours(
        config.policy, settings.loss, batch.policy, batch,
        advantage_B=advantages(settings, batch), rollout_logp_BT=padded(batch.rollout),
    )  # fmt: skip
    same(found, -torch.stack(terms).sum() / (len(LENGTHS) * LONGEST), batch.policy)


@SEEDS
@pytest.mark.parametrize("method", ["dapo", "dapo_paper"])
def test_dapo(method: str, seed: int) -> None:
    """Yu et al. 2025, equations 9, 12 and 13: all tokens alike, clips of 0.2 and 0.28, soft overlong punishment."""
    config, settings = composed(method, "algorithm.length_penalty.buffer=3")
    batch = Batch(seed)
    soft = [0.0 if n <= 4 else (4 - n) / 3 for n in LENGTHS]  # L_max = 7, L_cache = 3
    advantage = standardized([r + s for r, s in zip(batch.reward, soft, strict=True)])
    terms = [
        clipped((p - old).exp(), a, 0.2, 0.28) for p, old, a in zip(batch.policy, batch.rollout, advantage, strict=True)
    ]
    found = ours(
        config.policy, settings.loss, batch.policy, batch,
        advantage_B=advantages(settings, batch), rollout_logp_BT=padded(batch.rollout),
    )  # fmt: skip
    same(found, -torch.cat(terms).sum() / sum(LENGTHS), batch.policy)
    assert settings.more_batches > 0 and "reference" not in settings.roles
    assert composed(method)[1].length_penalty(torch.tensor([6, 7])).tolist() == [0.0, -1.0]  # a buffer of 7 // 5


@SEEDS
def test_gspo(seed: int) -> None:
    """Zheng et al. 2025, equations 5 to 7: the ratio itself is differentiated here."""
    config, settings = composed("gspo")
    batch = Batch(seed, apart=6e-4)
    terms, bound = [], 0
    for p, old, a in zip(batch.policy, batch.rollout, standardized(batch.reward), strict=True):
        s = ((p - old).sum() / len(p)).exp()
        terms.append(clipped(s, a, 3e-4, 4e-4))
        bound += not 1 - 3e-4 <= float(s.detach()) <= 1 + 4e-4
    assert 0 < bound < len(LENGTHS)
    found = ours(
        config.policy, settings.loss, batch.policy, batch,
        advantage_B=advantages(settings, batch), rollout_logp_BT=padded(batch.rollout),
    )  # fmt: skip
    same(found, -torch.stack(terms).mean(), batch.policy)


@SEEDS
def test_rloo(seed: int) -> None:
    """Ahmadian et al. 2024, section 3: R = r - beta log(p / q) of the response, the mean of the others' as baseline."""
    config, settings = composed("rloo_paper")
    batch = Batch(seed, apart=0.0)
    paid = [
        r - 0.03 * float((p.detach() - q).sum())
        for r, p, q in zip(batch.reward, batch.policy, batch.reference, strict=True)
    ]
    terms = []
    for i, p in enumerate(batch.policy):
        others = [paid[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        terms.append((paid[i] - fmean(others)) * p.sum())
    advantage_B = advantages(settings, batch, padded(batch.reference))
    found = ours(config.policy, settings.loss, batch.policy, batch, advantage_B=advantage_B)
    same(found, -torch.stack(terms).mean(), batch.policy)
    assert settings.group_size == 4


@SEEDS
def test_remax(seed: int) -> None:
    """Li et al. 2023, algorithm 1."""
    config, settings = composed("remax")
    batch = Batch(seed, apart=0.0)
    greedy = [0.3, -0.2, 0.1, 0.7, 0.0, 1.0, -1.0, 0.5]
    terms = [(r - b) * p.sum() for r, b, p in zip(batch.reward, greedy, batch.policy, strict=True)]
    advantage_B = batch.reward_B - torch.tensor(greedy, dtype=F64)
    found = ours(config.policy, settings.loss, batch.policy, batch, advantage_B=advantage_B)
    same(found, -torch.stack(terms).mean(), batch.policy)


@SEEDS
def test_reinforce_pp(seed: int) -> None:
    """Hu et al. 2025, section 3: A_t = r - beta (KL from t on), whitened over the batch; a mean of means over tokens."""
    config, settings = composed("reinforce_pp_paper")
    batch = Batch(seed)
    batch.reward[0] = 40.0  # is not clipped
    advantage = [
        [r - 0.01 * float((old - q)[t:].sum()) for t in range(len(old))]
        for r, old, q in zip(batch.reward, batch.rollout, batch.reference, strict=True)
    ]
    every = [a for row in advantage for a in row]
    terms = [
        clipped((p - old).exp(), (torch.tensor(row, dtype=F64) - fmean(every)) / stdev(every), 0.2, 0.2).mean()
        for p, old, row in zip(batch.policy, batch.rollout, advantage, strict=True)
    ]
    reward_BT = token_rewards(
        batch.samples, batch.reward_B, padded(batch.reference), settings.kl_coef, 1.0, settings.reward_clip
    )
    advantage_BT = token_advantages(reward_BT, batch.samples, settings.gamma)
    mean, std = mean_and_std(row_moments(advantage_BT, batch.mask_BT))
    found = ours(
        config.policy, settings.loss, batch.policy, batch,
        advantage_BT=whiten(advantage_BT, batch.mask_BT, mean=mean, std=std), rollout_logp_BT=padded(batch.rollout),
    )  # fmt: skip
    same(found, -torch.stack(terms).mean(), batch.policy)


@SEEDS
def test_ppo(seed: int) -> None:
    """Schulman et al. 2017, equations 7, 9 and 11, on the rewards of Ouyang et al. 2022, equation 2."""
    config, settings = composed("ppo_paper")
    batch = Batch(seed)
    surrogate, squared, every_advantage = [], [], []
    columns = (batch.policy, batch.rollout, batch.reference, batch.value, batch.value_now, batch.reward)
    for p, old, q, v, v_now, r in zip(*columns, strict=True):
        reward = -0.02 * (old - q)
        reward[-1] += r
        delta = reward + torch.cat([v[1:], torch.zeros(1, dtype=F64)]) - v
        a = torch.stack([sum(0.95 ** (k - t) * delta[k] for k in range(t, len(v))) for t in range(len(v))])  # type: ignore[arg-type, misc]
        every_advantage.append(a)
        surrogate.append(clipped((p - old).exp(), a, 0.2, 0.2))
        squared.append((v_now - (a + v)).square())
    kl_coef = settings.kl_control.initial
    reward_BT = token_rewards(
        batch.samples, batch.reward_B, padded(batch.reference), kl_coef, 1.0, settings.reward_clip
    )
    made = estimate(settings.advantages, reward_BT, padded(batch.value), batch.samples, settings.gamma, settings.lam)
    found = ours(
        config.policy, settings.loss, batch.policy, batch,
        advantage_BT=made.advantage_BT, rollout_logp_BT=padded(batch.rollout),
    )  # fmt: skip
    same(found, -torch.cat(surrogate).mean(), batch.policy)
    found = ours(
        config.critic, settings.value_loss, batch.value_now, batch,
        return_BT=made.return_BT, rollout_value_BT=padded(batch.value),
    )  # fmt: skip
    same(2 * found, torch.cat(squared).mean(), batch.value_now)
    assert not settings.whiten and config.policy.minibatches == config.critic.minibatches == 8


def pairs(batch: Batch) -> list[tuple[Any, Any, Any, Any]]:
    """(log p of the chosen, of the rejected, log q of each), token by token."""
    return [(batch.policy[i], batch.policy[i + 1], batch.reference[i], batch.reference[i + 1]) for i in range(0, 8, 2)]


def log_odds(p: Tensor) -> Tensor:
    return p.mean() - (1 - p.mean().exp()).log()


def log_sigmoid(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def robust(x: Tensor) -> Tensor:
    return -(0.9 * log_sigmoid(x) - 0.1 * log_sigmoid(-x)) / 0.8


PREFERENCES: dict[str, Callable[[Any, Any, Any, Any], Tensor]] = {
    # Rafailov et al. 2023, equation 7; Guo et al. 2024 take the same on their own samples
    "dpo": lambda w, l, qw, ql: -log_sigmoid(0.1 * ((w - qw).sum() - (l - ql).sum())),  # noqa: E741
    "online_dpo": lambda w, l, qw, ql: -log_sigmoid(0.1 * ((w - qw).sum() - (l - ql).sum())),  # noqa: E741
    # Ray Chowdhury et al. 2024, section 3, a tenth of the labels wrong
    "robust_dpo": lambda w, l, qw, ql: robust(0.1 * ((w - qw).sum() - (l - ql).sum())),  # noqa: E741
    # Azar et al. 2023, equation 17
    "ipo_paper": lambda w, l, qw, ql: ((w - qw).sum() - (l - ql).sum() - 1 / (2 * 0.1)).square(),  # noqa: E741
    # Meng et al. 2024, equation 6
    "simpo": lambda w, l, qw, ql: -log_sigmoid(2.0 * w.mean() - 2.0 * l.mean() - 1.0),  # noqa: E741
    # Hong et al. 2024, equations 4 to 7
    "orpo": lambda w, l, qw, ql: -w.mean() - 0.1 * log_sigmoid(log_odds(w) - log_odds(l)),  # noqa: E741
}


@SEEDS
@pytest.mark.parametrize("method", PREFERENCES)
def test_preferences(method: str, seed: int) -> None:
    config, settings = composed(method)
    batch = Batch(seed)
    fields = {"reference_sum_B": row_sums(padded(batch.reference), batch.mask_BT)}
    if "reference" not in settings.roles:
        fields = {}
    found = ours(config.policy, settings.loss, batch.policy, batch, **fields)
    same(found, torch.stack([PREFERENCES[method](*pair) for pair in pairs(batch)]).mean(), batch.policy)


@SEEDS
def test_kto(seed: int) -> None:
    """Ethayarajh et al. 2024, equations 7 and 8: lambda_y - v."""
    config, settings = composed("kto")
    batch = Batch(seed)
    good, z_0 = [True, False, False, True, True, False, True, False], 0.4
    terms = []
    for p, q, label in zip(batch.policy, batch.reference, good, strict=True):
        r = (p - q).sum()
        terms.append(1 - torch.sigmoid(0.1 * (r - z_0) if label else 0.1 * (z_0 - r)))
    reference_sum_B = row_sums(padded(batch.reference), batch.mask_BT)
    fields = {"label_B": torch.tensor(good), "reference_sum_B": reference_sum_B, "kl": z_0}
    found = ours(config.policy, settings.loss, batch.policy, batch, **fields)
    same(found, torch.stack(terms).mean(), batch.policy)


def test_reward_model() -> None:
    """Stiennon et al. 2020, section 3.4."""
    config, settings = composed("reward_model")
    score_B = Batch(0).score.requires_grad_()
    mask_BT = Batch(0).mask_BT
    loss_B, _ = settings.loss(score_B, mask_BT=mask_BT)
    found = global_mean(loss_B, mask_BT, Totals(float(mask_BT.sum()), 8.0), config.reward_model, LONGEST)
    wanted = torch.stack([-log_sigmoid(score_B[i] - score_B[i + 1]) for i in range(0, 8, 2)]).mean()
    same(found, wanted, [score_B])


def test_every_method_says_what_it_is() -> None:
    """Each is called published, and tested above, or says what differs; in its file, in --help and in docs/methods.md."""
    tested = set(PREFERENCES) | {
        "grpo_paper", "dr_grpo", "dapo_paper", "gspo", "rloo_paper", "remax", "reinforce_pp_paper", "ppo_paper", "kto",
        "reward_model",
    }  # fmt: skip
    told, table = help_text().replace("\n        ", " "), (CONF.parent / "docs" / "methods.md").read_text()
    for name in methods():
        comment = comment_of(CONF / "algorithm" / f"{name}.yaml")
        assert comment and comment in told, name
        assert f"`{name}`" in table, name
        if name not in ("sft", "rank_samples"):
            assert "It differs" in comment or ("as published" in comment.lower() and name in tested), name
