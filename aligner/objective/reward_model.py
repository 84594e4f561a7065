"""Bradley-Terry loss of reward models."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from aligner.objective.masked import check_rows, difference
from aligner.objective.pairs import pair_rows, pairwise_loss


@pairwise_loss
def bradley_terry(
    score_B: Tensor,
    *,
    mask_BT: Tensor | None = None,
    preference_B: Tensor | None = None,
    margin_B: Tensor | None = None,
    centre_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the preferences under Bradley-Terry: Stiennon et al. 2020, arXiv 2009.01325, section 3.4.

        loss = -log sigmoid(score_w - score_l - margin) + centre_coef (score_w + score_l)^2

    The margin, larger for a clearer preference, is Llama 2's: Touvron et al. 2023, arXiv 2307.09288, equation 2. The
    centring term fixes the additive constant that differences leave free: Eisenstein et al. 2023, arXiv 2312.09244.

    Args:
        score_B: [B] float32 or float64; rows 2i and 2i + 1 are a pair.
        mask_BT: [B, T] bool; a pair is masked out if one of its rows has no trained token.
        preference_B: [B] floating: 1 chosen, -1 rejected, 0 for both rows to mask the pair out; None: the first is
            chosen.
        margin_B: [B], in the score's unit, 0 or more, the same on both rows of a pair.
        centre_coef: coefficient of the centring term; 0.01 is usual.

    Returns:
        loss_B: [B], dtype of score_B, both rows holding their pair's loss, 0 for masked pairs. ln 2 for equal scores
            without a margin.
        metrics: [B], detached: "chosen_reward", "rejected_reward", "margin" and "pair_accuracy" of the raw scores, and
            "score", each row's own.

    Raises:
        ValueError: a negative centre_coef, or preferences that contradict each other.
    """
    assert score_B.ndim == 1, f"score_B must be [B], got {tuple(score_B.shape)}"
    assert score_B.dtype in (torch.float32, torch.float64), f"score_B is {score_B.dtype}"
    assert mask_BT is None or (mask_BT.ndim == 2 and len(mask_BT) == len(score_B) and mask_BT.dtype == torch.bool)
    check_rows("margin_B", margin_B, len(score_B))
    if not centre_coef >= 0.0:
        raise ValueError(f"centre_coef={centre_coef} must be 0 or more; 0.01 is usual.")
    pairs = pair_rows(len(score_B), mask_BT, preference_B, score_B.device)
    chosen_P, rejected_P = pairs.split(score_B.double())
    z_P = difference(chosen_P, rejected_P)
    if margin_B is not None:
        z_P = z_P - pairs.split(margin_B.detach().double())[0]
    loss_P = -logsigmoid(z_P)
    if centre_coef != 0.0:
        loss_P = loss_P + centre_coef * (chosen_P + rejected_P).square()
    metrics = pairs.metrics(chosen_P, rejected_P, score_B.dtype)
    metrics["score"] = torch.where(pairs.counted_B, score_B.detach(), 0.0)
    return pairs.join(loss_P, score_B.dtype), metrics
