"""Attention of packed microbatches inside transformers' models: `implementation` is registered with transformers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aligner.trainer.packing import Packed
from aligner.trainer.prefix_attention import computed_tokens, prefix_attention

NAME, OBSERVED = "aligner_packed", "aligner_observed"
"""The attention implementations' names in transformers: of packed rows, and of a model without memory, which is observed."""
_SAYS_NOTHING = ("position_ids", "cache_position")
"""Tensors that attention functions get and that change nothing without a cache."""


class NotPackable(ValueError):
    """A layer attends in ways that `implementation` does not compute."""


@dataclass
class Rows:
    """The segments of the microbatch that a model is running, for its attention layers."""

    recompute: bool
    """Compute attention again in the backward instead of keeping its activations."""
    explicit: bool
    """The model's attention has soft-capping or sinks, which torch's kernels do not: scores are computed one row at a time."""
    lengths: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def enter(self, batch: Packed) -> None:
        """The model runs this microbatch next."""
        self.lengths, self.parents = (tuple(column) for column in batch.segments_S2.T.tolist())

    def computed(self, batch: Packed, query: Tensor) -> int:
        """Tokens that attention computes for a microbatch and queries like this one, with the padding of calls that rows share."""
        lengths, parents = (tuple(column) for column in batch.segments_S2.T.tolist())
        return sum(lengths) if self.explicit else computed_tokens(lengths, parents, query)


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, implementation)
    AttentionMaskInterface.register(NAME, window_mask)
    AttentionInterface.register(OBSERVED, _observed)
    AttentionMaskInterface.register(OBSERVED, lambda *_, **__: window_mask().to("meta"))


def use_rows(model: nn.Module, rows: Rows | list[bool]) -> None:
    """Let the model's attention layers find the microbatch's rows, or where to note their calls."""
    for module in model.modules():
        module.packed_rows = rows  # type: ignore[assignment]


def window_mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor:
    """In place of an attention mask, [1, 1, 1, 1] int64 on the host: the sliding window in tokens, 0 for none."""
    return torch.full((1, 1, 1, 1), local_size or 0, dtype=torch.long)


def implementation(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: causal attention inside each row of the microbatch that `Rows` describes.

    Args:
        query: [1, query heads, T, head_dim]; key, value: [1, key/value heads, T, head_dim].
        attention_mask: of `window_mask`.
        sliding_window: number of tokens that a query attends to, itself included; None: what the mask says.
        softcap: scores become softcap x tanh(scores / softcap) (Gemma 2).
        s_aux: [query heads], logits of a sink that takes a share of each query's probability (gpt-oss).

    Returns:
        ([1, T, query heads, head_dim], None).

    Raises:
        NotPackable: see `_check_call`.
    """
    _check_call(module, attention_mask, more)
    rows: Rows = module.packed_rows  # type: ignore[assignment]
    window = sliding_window if attention_mask is None else int(attention_mask.flatten()[0]) or None
    if sliding_window is not None and window is None:
        window = sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_TND, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))

    def attend(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if softcap is None and s_aux is None:
            return prefix_attention(q_TND, k_TKD, v_TKD, rows.lengths, rows.parents, scale, window)
        assert rows.explicit and max(rows.parents) < 0, "attention with soft-capping or sinks shares no prefixes"
        return explicit_attention(q_TND, k_TKD, v_TKD, rows.lengths, scale, window, softcap, s_aux)

    again = rows.recompute and torch.is_grad_enabled()
    out = (
        checkpoint(attend, q_TND, k_TKD, v_TKD, use_reentrant=False, preserve_rng_state=False)
        if again
        else attend(q_TND, k_TKD, v_TKD)
    )
    return out.view(1, len(q_TND), q_TND.shape[1], -1), None


def _check_call(module: nn.Module, attention_mask: Tensor | None, more: dict[str, Any]) -> None:
    """Raises NotPackable for attention that is not causal, that has a mask of the layer's own making (it holds numbers of each
    query and key, where `window_mask` made one number), or that is changed by further tensors or functions."""
    name = type(module).__name__
    if attention_mask is not None and (attention_mask.numel() != 1 or attention_mask.is_floating_point()):
        raise NotPackable(f"{name} makes a mask of its own for each query and key; engine=fsdp does not support it.")
    if not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise NotPackable(f"{name} attends to later tokens; engine=fsdp does not support it.")
    changes = [key for key, value in more.items() if isinstance(value, Tensor) or callable(value)]
    unknown = sorted({*changes}.difference(_SAYS_NOTHING))
    if unknown:
        raise NotPackable(f"{name} changes its attention by {unknown[0]}; engine=fsdp does not support it.")


def _observed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """In place of `implementation`, of tensors without memory: notes whether the layer needs `explicit_attention`."""
    _check_call(module, attention_mask, more)
    module.packed_rows.append(softcap is not None or s_aux is not None)  # type: ignore[operator,union-attr]
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


def observe(model: Any) -> list[bool] | None:
    """Run the layers of a model without memory that has the implementation OBSERVED, and that is of no further use.

    Returns:
        For each attention call, whether it has soft-capping or sinks; None: the model's forward pass looks at values, so that
        it runs with memory alone.

    Raises:
        NotPackable: see `_check_call`.
    """
    calls: list[bool] = []
    use_rows(model, calls)
    for module in model.to("meta").modules():
        if hasattr(module, "_is_expert_parallel"):  # experts, which look at how many tokens each one has
            module.forward = lambda hidden, *_: torch.zeros_like(hidden)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    there = torch.ones_like(tokens, dtype=torch.bool)  # without a mask, transformers looks at the positions' values
    try:
        with torch.no_grad():
            model.base_model(input_ids=tokens, position_ids=tokens, attention_mask=there, use_cache=False)
    except NotPackable:
        raise
    except Exception:  # whatever the model's own code raises
        return None
    return calls


def explicit_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_N: Tensor | None,
) -> Tensor:
    """Causal attention by its formula, a row at a time: softmax of soft-capped scores, with a sink beside each query's keys.

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim].
        lengths: tokens of each row, in order; their sum is T.

    Returns:
        [T, query heads x head_dim].
    """
    groups = q_TND.shape[1] // k_TKD.shape[1]
    outs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q_TND, k_TKD, v_TKD)), strict=True):
        tokens = q.shape[1]
        scores_NTS = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if softcap is not None:
            scores_NTS = softcap * torch.tanh(scores_NTS / softcap)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        scores_NTS = scores_NTS.float().masked_fill(hidden, -torch.inf)
        if sink_N is not None:
            sinks_NT1 = sink_N.float()[:, None, None].expand(-1, tokens, 1)
            scores_NTS = torch.cat([scores_NTS, sinks_NT1], -1)
        weights_NTS = scores_NTS.softmax(-1)[..., :tokens].to(q.dtype)
        outs.append((weights_NTS @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1))
    return torch.cat(outs)
