"""Batch operations for preference and feedback loops: read scores, labels and margins, rank pairs, mask rows.

Rows 2i and 2i+1 are one pair; `preference_B` is +1 for the better row, -1 for the worse, 0 for both rows of a pair that is
masked out. Pure functions of rows; those that look at other rows need complete pairs or the whole batch, as documented.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aligner.data.samples import Samples, pad_rows


def scores_of(samples: Samples, field: str = "score") -> Tensor:
    """float32 [B]: each row's `field`; NaN if it is missing or null.

    Raises:
        ValueError: a value that is not a number.
    """
    return _column(samples, field, "a number", lambda value: type(value) in (int, float), math.nan)


def labels_of(samples: Samples) -> Tensor:
    """bool [B]: each row's 'label' (True: desirable).

    Raises:
        ValueError: a row whose 'label' is not true or false.
    """
    return _column(samples, "label", "true or false", lambda value: isinstance(value, bool), None).bool()


def margins_of(samples: Samples) -> Tensor:
    """float32 [B]: the margin of each pair on both of its rows: the difference of their 'score's, else the row's 'margin'.
    Needs complete pairs.

    Raises:
        ValueError: a pair with neither.
    """
    score_P2 = scores_of(samples).view(-1, 2)
    difference_P = score_P2[:, 0] - score_P2[:, 1]
    margin_P = torch.where(torch.isnan(difference_P), scores_of(samples, "margin")[::2], difference_P)
    if bool(torch.isnan(margin_P).any()):
        row = samples.fields[2 * int(torch.isnan(margin_P).nonzero()[0])]
        raise ValueError(
            "a margin needs scores: give each row of data.path 'score_chosen' and 'score_rejected', 'margin', or "
            f"'response' and 'score' as lists; a row has {sorted(row)}."
        )
    return margin_P.repeat_interleave(2)


def preferences_from_rewards(reward_B: Tensor) -> Tensor:
    """preference_B, float32 [B], from rewards of two responses per prompt: +1 for the higher reward, -1 for the lower, 0 for
    both if the rewards are equal or one is missing (NaN). Needs complete pairs."""
    assert reward_B.ndim == 1 and len(reward_B) % 2 == 0, f"reward_B must be pairs, got {tuple(reward_B.shape)}"
    reward_P2 = reward_B.view(-1, 2)
    sign_P = torch.sign(reward_P2[:, 0] - reward_P2[:, 1]).nan_to_num(0.0).float()
    return torch.stack([sign_P, -sign_P], dim=1).flatten()


def mask_unranked_pairs(samples: Samples, preference_B: Tensor) -> Samples:
    """Mask out rows of preference 0: they get no gradient and do not count in the loss's denominators."""
    ranked_B = preference_B != 0
    return samples if bool(ranked_B.all()) else replace(samples, mask_BT=samples.mask_BT & ranked_B[:, None])


def mismatched(samples: Samples, max_tokens: int | None = None) -> Samples:
    """Prompts with responses to other prompts, on which KTO's reference point is estimated (Ethayarajh et al. 2024, arXiv
    2402.01306, section 4.1: prompt i with response i + 1 of the same batch). Needs the whole batch.

    Args:
        max_tokens: truncate prompt + response to this length (the model's positions); None: never.

    Returns:
        As many rows, in the same order: prompt, index and fields of row i; response and mask of the next row with another
        prompt (cyclically; of row i + 1 if all prompts are equal).

    Raises:
        ValueError: fewer than two rows.
    """
    if samples.rows < 2:
        raise ValueError("a response to another prompt needs two rows in a batch; use data.prompts_per_step=2 or more.")
    rows = range(samples.rows)
    prompts = [samples.tokens_BT[b, : samples.prompt_len_B[b]].tolist() for b in rows]
    answers = [samples.response_tokens(b) for b in rows]
    masks = [samples.mask_BT[b, samples.prompt_len_B[b] : samples.length_B[b]].tolist() for b in rows]
    tokens, mask = [], []
    for b in rows:
        following = [(b + step) % samples.rows for step in range(1, samples.rows)]
        other = next((c for c in following if prompts[c] != prompts[b]), following[0])
        tokens.append((prompts[b] + answers[other])[:max_tokens])
        mask.append(([False] * len(prompts[b]) + masks[other])[:max_tokens])
    return replace(
        samples,
        tokens_BT=pad_rows(tokens, torch.long),
        length_B=torch.tensor([len(row) for row in tokens]),
        mask_BT=pad_rows(mask, torch.bool),
        rollout_logp_BT=None,
        truncated_B=None,
        version_BT=None,
    )


def _column(samples: Samples, field: str, expected: str, fits: Callable[[Any], bool], missing: float | None) -> Tensor:
    """float32 [B]: `field` of every row; `missing` if it is absent or null."""
    values = [row.get(field) for row in samples.fields]
    for row, value in zip(samples.fields, values, strict=True):
        if not (fits(value) or (value is None and missing is not None)):
            raise ValueError(
                f"{field!r} must be {expected} in every row of data.path, not {value!r}; a row has {sorted(row)}."
            )
    return torch.tensor([missing if value is None else float(value) for value in values], dtype=torch.float32)
