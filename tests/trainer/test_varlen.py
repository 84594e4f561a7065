"""CUDA's one-kernel attention, called with a stand-in that does on a CPU what torch documents, against what a CPU computes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aligner.trainer import packed_attention, prefix_attention
from aligner.trainer.packed_attention import causal_attention, has_varlen

SCALE = 0.25


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` as it is documented: a row's last query sees its last key (lower right)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1]) and query.shape[2] == key.shape[2] == value.shape[2]
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (
        (max_q, max_k) == (max(lengths_q), max(lengths_k))
        and sum(lengths_q) == len(query)
        and sum(lengths_k) == len(key)
    )
    outs = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        place = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (place >= 0) & ((place <= window_size[0]) | torch.tensor(window_size[0] < 0))
        outs.append(
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(outs)


def tensors(tokens: int, value_dim: int = 16) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = (4, 16), (2, 16), (2, value_dim)
    return [torch.randn(tokens, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def outcome(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, value_dim: int = 16
) -> list[Tensor]:
    """Output and gradients."""
    given = tensors(sum(lengths), value_dim)
    out = prefix_attention.prefix_attention(*given, lengths, parents, SCALE, window)
    torch.manual_seed(0)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), given)]


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((7, 7), (-1, -1)),
        ((3, 9, 1, 14), (-1, -1, -1, -1)),
        ((8, 5, 6, 11), (-1, 0, 0, -1)),  # two rows share a prefix, one is alone
        ((6, 4, 3, 2, 5, 1), (-1, 0, 1, 1, 0, -1)),  # a prefix of prefixes, and padding
    ],
)
def test_equal_to_the_padded_calls(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(lengths, parents, window)
    for module in (packed_attention, prefix_attention):
        monkeypatch.setattr(module, "has_varlen", lambda query: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", documented)
    assert prefix_attention.computed_tokens(lengths, parents, torch.empty(0, 16)) == sum(lengths), "no padding"
    for one, other in zip(outcome(lengths, parents, window), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parents", [(-1, -1, -1), (-1, 0, 0)])
def test_values_may_have_fewer_dimensions(parents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DeepSeek's latent attention, where torch's kernel wants queries, keys and values of one size."""
    expected = outcome((8, 5, 6), parents, None, value_dim=10)
    for module in (packed_attention, prefix_attention):
        monkeypatch.setattr(module, "has_varlen", lambda query: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", documented)
    for one, other in zip(outcome((8, 5, 6), parents, None, value_dim=10), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parents", [(-1, -1, -1), (-1, 0, 0)])
def test_torch_takes_the_arguments(parents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself on fake tensors of a GPU: arguments, types and shapes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(12, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        assert (
            has_varlen(q)
            and not has_varlen(q.float())
            and not has_varlen(torch.empty(12, 4, 60, dtype=q.dtype, device="cuda"))
        )
        for module in (packed_attention, prefix_attention):
            monkeypatch.setattr(module, "has_varlen", lambda query: True)
        monkeypatch.setattr(
            packed_attention, "_offsets", lambda lengths, device: torch.empty(4, dtype=torch.int32, device=device)
        )
        index = torch.empty(18 if parents[1] >= 0 else 12, dtype=torch.long, device="cuda")
        keys = (3, 7, 8) if parents[1] >= 0 else (3, 4, 5)
        monkeypatch.setattr(prefix_attention, "_row_keys", lambda *given: (index, keys))
        monkeypatch.setattr(
            prefix_attention, "saved_as_views", lambda *pairs: nullcontext()
        )  # fake storages have no address
        out = prefix_attention.prefix_attention(q, k, v, (3, 4, 5), parents, 0.125, None)
        assert (out.shape, out.dtype, out.device.type) == ((12, 256), torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with FakeTensorMode():
        assert not has_varlen(torch.empty(12, 4, 64, dtype=torch.float16, device="cuda"))
    assert not has_varlen(torch.empty(12, 4, 64, dtype=torch.bfloat16))


def test_float32_on_cuda_has_as_many_key_heads_as_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    inner: Any = F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        seen.append((k.shape[1], kwargs["enable_gqa"]))
        return inner(q, k, v, **kwargs)  # type: ignore[no-any-return]

    q, k, v = (torch.randn(2, heads, 6, 16) for heads in (4, 2, 2))
    expected = causal_attention(q, k, v, SCALE, None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(packed_attention, "_lacks_grouped_kernel", lambda query: True)
    torch.testing.assert_close(causal_attention(q, k, v, SCALE, None), expected)
    assert seen == [(4, False)]
