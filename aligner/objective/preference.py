"""Preference losses: DPO, robust DPO, IPO, ORPO and SimPO on chosen/rejected pairs; KTO on single labelled responses.

Arguments that the pairwise losses share:

    policy_logp_BT      [B, T] float32 or float64, nats; rows 2i and 2i + 1 are a pair
    mask_BT             [B, T] bool, the trained tokens; outside the mask policy_logp_BT may hold any value, even NaN
    reference_sum_B     [B], nats: the reference's log-probability of the response, from `row_sums`, best in float64
    preference_B        [B] floating: 1 chosen, -1 rejected, 0 for both to mask the pair out; None: the first is chosen

They return loss_B, [B] in the dtype of policy_logp_BT, both rows holding their pair's loss, and 0 for masked pairs (also
those with a row without trained tokens); and metrics [B], detached: "chosen_reward", "rejected_reward" (the implicit
rewards), "margin", "pair_accuracy", and the compared "chosen_logp" and "rejected_logp" in nats. Only policy_logp_BT gets
gradients. Sums and differences are float64. Each raises ValueError for a setting out of range and for contradictory
preferences.

Notation: d = log p(response) - log q(response) for policy p and reference q; w the chosen, l the rejected response;
m(x) = x / number of trained tokens.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from aligner.objective.masked import check_rows, check_tokens, difference, row_sums
from aligner.objective.pairs import PairRows, pair_rows, pairwise_loss

LogRatio = Literal["sum", "token_mean"]

# log(1 - p) is -inf at p = 1, which a confident policy reaches in float32.
MAX_MEAN_LOGP = -1e-7


@pairwise_loss
def dpo(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    reference_sum_B: Tensor,
    preference_B: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    log_ratio: LogRatio = "sum",
    nll_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation: Rafailov et al. 2023, arXiv 2305.18290, equation 7.

        z    = beta (d_w - d_l)
        loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z) - nll_coef m(log p(w))

    label_smoothing is the probability that a label is wrong: conservative DPO, Mitchell 2023, "A note on DPO with noisy
    preferences". log_ratio="token_mean" uses m(d) for d (length-normalised DPO): Lambert et al. 2024 (Tulu 3), arXiv
    2411.15124, section 5; beta is then about ten times larger. nll_coef adds an NLL term on the chosen response: Pang et
    al. 2024 (iterative RPO), arXiv 2404.19733, section 2.

    Where policy and reference agree the loss is ln 2.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing, 1.0)
    pairs, policy_B, count_B = _rows(policy_logp_BT, mask_BT, preference_B)
    chosen_P, rejected_P = pairs.split(beta * _log_ratio(policy_B, reference_sum_B, count_B, log_ratio))
    loss_P = _cross_entropy(difference(chosen_P, rejected_P), label_smoothing)
    if nll_coef != 0.0:
        loss_P = loss_P - nll_coef * pairs.split(policy_B / count_B)[0]
    return _report(pairs, loss_P, chosen_P, rejected_P, policy_B, policy_logp_BT.dtype)


@pairwise_loss
def robust_dpo(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    reference_sum_B: Tensor,
    preference_B: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Robust DPO: an unbiased estimate of the DPO loss on true labels when a fraction label_smoothing of them is flipped.

        z    = beta (d_w - d_l)
        loss = (-(1 - label_smoothing) log sigmoid(z) + label_smoothing log sigmoid(-z)) / (1 - 2 label_smoothing)

    Ray Chowdhury et al. 2024, arXiv 2403.00409, section 3. It has no lower bound. Where policy and reference agree it
    is ln 2.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing, 0.5)
    pairs, policy_B, count_B = _rows(policy_logp_BT, mask_BT, preference_B)
    chosen_P, rejected_P = pairs.split(beta * _log_ratio(policy_B, reference_sum_B, count_B, "sum"))
    z_P = difference(chosen_P, rejected_P)
    loss_P = -(1.0 - label_smoothing) * logsigmoid(z_P)
    if label_smoothing != 0.0:
        loss_P = loss_P + label_smoothing * logsigmoid(-z_P)
    loss_P = loss_P / (1.0 - 2.0 * label_smoothing)
    return _report(pairs, loss_P, chosen_P, rejected_P, policy_B, policy_logp_BT.dtype)


@pairwise_loss
def ipo(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    reference_sum_B: Tensor,
    preference_B: Tensor | None = None,
    beta: float = 0.1,
    log_ratio: LogRatio = "token_mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Identity preference optimisation: regression of the margin to 1 / (2 beta).

        loss = (m(d_w) - m(d_l) - 1 / (2 beta))^2

    Azar et al. 2023, arXiv 2310.12036, equation 17, where beta is tau and d is the sum: log_ratio="sum". The mean over
    tokens is common practice, so that one beta suits short and long responses.
    """
    _check_beta(beta)
    pairs, policy_B, count_B = _rows(policy_logp_BT, mask_BT, preference_B)
    chosen_P, rejected_P = pairs.split(_log_ratio(policy_B, reference_sum_B, count_B, log_ratio))
    loss_P = (difference(chosen_P, rejected_P) - 0.5 / beta).square()
    return _report(pairs, loss_P, beta * chosen_P, beta * rejected_P, policy_B, policy_logp_BT.dtype)


@pairwise_loss
def orpo(
    policy_logp_BT: Tensor, *, mask_BT: Tensor, preference_B: Tensor | None = None, beta: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Odds ratio preference optimisation: SFT and preference learning in one loss, without a reference.

        a    = m(log p(response))            odds = e^a / (1 - e^a)
        loss = -a_w - beta log sigmoid(log(odds_w / odds_l))

    Hong et al. 2024, arXiv 2403.07691, equations 4 to 7; beta is lambda. The NLL term covers the chosen response, not the
    prompt. Reported rewards are beta a; "chosen_logp" and "rejected_logp" are a. In the odds a is clamped from above at
    -1e-7, beyond which they have no gradient.
    """
    _check_beta(beta)
    pairs, policy_B, count_B = _rows(policy_logp_BT, mask_BT, preference_B)
    mean_B = policy_B / count_B
    below_B = mean_B.clamp(max=MAX_MEAN_LOGP)
    log_odds_w_P, log_odds_l_P = pairs.split(below_B - (-torch.expm1(below_B)).log())
    chosen_P, rejected_P = pairs.split(mean_B)
    loss_P = -chosen_P - beta * logsigmoid(difference(log_odds_w_P, log_odds_l_P))
    return _report(pairs, loss_P, beta * chosen_P, beta * rejected_P, mean_B, policy_logp_BT.dtype)


@pairwise_loss
def simpo(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    preference_B: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Simple preference optimisation: length-normalised log-probabilities with a target margin, without a reference.

        z    = beta (m(log p(w)) - m(log p(l))) - gamma
        loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z) - nll_coef m(log p(w))

    Meng et al. 2024, arXiv 2405.14734, equation 6; there gamma / beta is about 0.5. The loss lets the chosen response's
    probability fall as long as the rejected one's falls faster; nll_coef counteracts that (sft_weight in their code, 0
    in the paper). "margin" excludes gamma; "chosen_logp" and "rejected_logp" are means over tokens.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing, 1.0)
    pairs, policy_B, count_B = _rows(policy_logp_BT, mask_BT, preference_B)
    mean_B = policy_B / count_B
    chosen_P, rejected_P = pairs.split(beta * mean_B)
    loss_P = _cross_entropy(difference(chosen_P, rejected_P) - gamma, label_smoothing)
    if nll_coef != 0.0:
        loss_P = loss_P - nll_coef * pairs.split(mean_B)[0]
    return _report(pairs, loss_P, chosen_P, rejected_P, mean_B, policy_logp_BT.dtype)


def kto(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    label_B: Tensor,
    reference_sum_B: Tensor,
    kl: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimisation on single responses labelled desirable or undesirable.

        loss = desirable_weight   (1 - sigmoid(beta (d - kl)))         desirable
        loss = undesirable_weight (1 - sigmoid(beta (kl - d)))         undesirable

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7. With weights of 1 it is 1/2 where d = kl.

    Args:
        policy_logp_BT, mask_BT, reference_sum_B: as for pairs, but each row is independent.
        label_B: [B] bool, or numbers whose positive values mean desirable.
        kl: z_0, nats per response, 0 or more: the mean of d over the global batch for responses to OTHER prompts,
            clamped at 0 (see `reference_point`). A float: it has no gradient, and must not depend on the sharding.
        desirable_weight, undesirable_weight: lambda_D and lambda_U; the paper keeps their ratio times the ratio of
            desirable to undesirable rows between 1 and 4/3.

    Returns:
        loss_B: [B], dtype of policy_logp_BT, 0 for a row without a trained token.
        metrics: [B], detached. "reward": beta d; "margin": beta d if desirable, else -beta d; "label_accuracy": whether
            d - kl has the label's sign; "desirable": 1 if desirable; "logp": log p.

    Raises:
        ValueError: a setting out of range.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT)
    check_rows("label_B", label_B, len(mask_BT))
    check_rows("reference_sum_B", reference_sum_B, len(mask_BT))
    _check_beta(beta)
    if not 0.0 <= kl < float("inf"):
        raise ValueError(f"kl={kl} must be 0 or more; clamp the batch's estimate at 0.")
    if not desirable_weight >= 0.0 or not undesirable_weight >= 0.0:
        raise ValueError(
            f"desirable_weight={desirable_weight} and undesirable_weight={undesirable_weight} must be 0 or more."
        )
    counted_B = mask_BT.any(dim=1)
    policy_B = row_sums(policy_logp_BT, mask_BT)
    d_B = difference(policy_B, torch.where(counted_B, reference_sum_B.detach().double(), 0.0))
    desirable_B = label_B > 0
    sign_B = torch.where(desirable_B, 1.0, -1.0).double()
    weight_B = desirable_weight * desirable_B.double() + undesirable_weight * (~desirable_B).double()
    # 1 - sigmoid(x) = sigmoid(-x), which is accurate for losses near 0.
    loss_B = weight_B * torch.sigmoid(-beta * sign_B * (d_B - kl))
    metrics = {
        "reward": beta * d_B,
        "margin": beta * sign_B * d_B,
        "label_accuracy": (sign_B * (d_B - kl) > 0).double(),
        "desirable": desirable_B.double(),
        "logp": policy_B,
    }
    dtype = policy_logp_BT.dtype
    row_metrics = {name: torch.where(counted_B, value_B.detach(), 0.0).to(dtype) for name, value_B in metrics.items()}
    return torch.where(counted_B, loss_B, 0.0).to(dtype), row_metrics


def reference_point(policy_sum_B: Tensor, reference_sum_B: Tensor, mask_BT: Tensor) -> float:
    """KTO's reference point z_0, a KL estimate in nats per response, 0 or more.

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1: the mean of d over responses to other prompts, clamped at 0.
    Rows without trained tokens do not count.

    Args:
        policy_sum_B, reference_sum_B: [B], nats, from `row_sums`, of the global batch.
        mask_BT: [B, T] bool, the trained tokens.
    """
    counted_B = mask_BT.any(dim=1)
    if not bool(counted_B.any()):
        return 0.0
    return max(0.0, float(difference(policy_sum_B, reference_sum_B)[counted_B].mean()))


def _rows(policy_logp_BT: Tensor, mask_BT: Tensor, preference_B: Tensor | None) -> tuple[PairRows, Tensor, Tensor]:
    """(pairs; each row's log-probability, 0 if masked out; number of trained tokens, at least 1); float64."""
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT)
    pairs = pair_rows(len(mask_BT), mask_BT, preference_B, mask_BT.device)
    mask_BT = mask_BT & pairs.counted_B[:, None]
    return pairs, row_sums(policy_logp_BT, mask_BT), mask_BT.sum(dim=1).clamp(min=1).double()


def _log_ratio(policy_B: Tensor, reference_sum_B: Tensor, count_B: Tensor, kind: LogRatio) -> Tensor:
    """[B] d or m(d), float64."""
    check_rows("reference_sum_B", reference_sum_B, len(policy_B))
    if kind not in get_args(LogRatio):
        raise ValueError(f"log_ratio={kind!r} is unknown; use one of {', '.join(get_args(LogRatio))}.")
    d_B = difference(policy_B, reference_sum_B.detach().double())
    return d_B if kind == "sum" else d_B / count_B


def _cross_entropy(z_P: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of logit z with label smoothing."""
    loss_P = -(1.0 - label_smoothing) * logsigmoid(z_P)
    # 0 * inf for a pair with an infinite margin would be NaN
    return loss_P if label_smoothing == 0.0 else loss_P - label_smoothing * logsigmoid(-z_P)


def _report(
    pairs: PairRows, loss_P: Tensor, chosen_P: Tensor, rejected_P: Tensor, logp_B: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_B, metrics) of a pairwise loss."""
    chosen_logp_P, rejected_logp_P = pairs.split(logp_B.detach())
    metrics = pairs.metrics(chosen_P, rejected_P, dtype)
    metrics["chosen_logp"], metrics["rejected_logp"] = (
        pairs.join(chosen_logp_P, dtype),
        pairs.join(rejected_logp_P, dtype),
    )
    return pairs.join(loss_P, dtype), metrics


def _check_beta(beta: float) -> None:
    if not 0.0 < beta < float("inf"):
        raise ValueError(f"beta={beta} must be more than 0; 0.1 is usual, 2 for SimPO.")


def _check_smoothing(label_smoothing: float, limit: float) -> None:
    if not 0.0 <= label_smoothing < limit:
        raise ValueError(f"label_smoothing={label_smoothing} must be 0 or more and less than {limit}; 0.1 is usual.")
