"""Fused MoE experts on a CPU: repacked for vLLM's kernels after a weight sync, verified expert by expert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from aligner.rollout.vllm.packing import EXACT_PROBE_PRODUCTS, Probes, not_held, probes_for

_GATE = 32.0
"""silu(32) is 32 in every data type here."""

_TOGETHER = 8
"""Experts that are asked in one call: each takes a copy of the probe."""


def _silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold all gates, then all ups."""
    gate, up = gate_up.chunk(2)
    return F.silu(gate) * up


def _swigluoai(gate_up: Tensor) -> Tensor:
    """gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), clamped at 7, of rows that hold gates and ups in turn."""
    gate, up = gate_up[0::2].clamp(max=7.0), gate_up[1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": _silu, "swigluoai": _swigluoai}
"""What vLLM's CPU kernel computes of an expert's gate and up projections, [2 width] -> [width], by its name."""


class PackedExperts:
    """The experts of one MoE layer on this rank.

    vLLM packs w13 (gate above up, or in turn, experts x 2 width x hidden) and w2 (down, experts x hidden x width) in place,
    after rounding the width up with zeros. Its own second packing is left out by vLLM, so it is asked for directly. Biases, of
    gpt-oss, stay plain; the layer is proven with them.
    """

    def __init__(self, path: str, module: Any) -> None:
        kinds = ("weight", "bias") if hasattr(module, "w13_bias") else ("weight",)
        self.storages: tuple[str, ...] = tuple(f"{path}:{name}_{kind}" for kind in kinds for name in ("w13", "w2"))
        self._activation = ACTIVATIONS[module.quant_method.moe.activation.value]
        self._path, self._module = path.removesuffix(".routed_experts"), module
        chosen = module.expert_map
        self._numbers = (
            list(range(module.local_num_experts)) if chosen is None else (chosen >= 0).nonzero()[:, 0].tolist()
        )
        """The expert that each local slot holds, counted over the whole layer."""

    def pack(self, plain: Mapping[str, Tensor]) -> None:
        for storage, value in plain.items():
            name = storage.rpartition(":")[2]
            if name.endswith("bias"):  # the layer's kernel holds this parameter
                self._module._parameters[name].data.copy_(value)
            else:
                self._module._parameters[name] = Parameter(value, requires_grad=False)
        self._module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(self._module)

    def prove(self, plain: Mapping[str, Tensor], round_: int) -> None:
        """Every expert, every time: its packed matrices, then all through the layer as it is called."""
        w13, w2, *biases = (plain[storage] for storage in self.storages)
        gate_up, down = self._module.w13_weight, self._module.w2_weight
        probes, products = self._prove_packed("gate and up projection", w13, self._pad_rows, gate_up, round_)
        self._prove_packed("down projection", w2, self._pad_columns, down, round_)
        self._prove_layer(probes.vectors[-1], products[:, -1], w2, biases)

    def _prove_packed(
        self, matrix_name: str, plain: Tensor, pad: Callable[[Tensor], Tensor], packed: Tensor, round_: int
    ) -> tuple[Probes, Tensor]:
        """Of each expert the packed matrix; gives what was asked, and the answers (experts, probes, rows)."""
        padded = [pad(matrix) for matrix in plain]
        rows, columns = padded[0].shape
        probes = probes_for(rows, columns, plain.dtype, round_, EXACT_PROBE_PRODUCTS // len(plain))
        products = torch.cat([self._multiply(experts, probes.vectors) for experts in packed.split(_TOGETHER)])
        for slot, number in enumerate(self._numbers):
            if not probes.held(products[slot], padded[slot]):
                raise not_held(f"{self._path}, expert {number}, {matrix_name}", plain[slot])
        return probes, products

    def _pad_rows(self, gate_up: Tensor) -> Tensor:
        """Rows of zeros after the gate and after the up projection, as the kernel has them."""
        more = (self._module.w13_weight.shape[1] - gate_up.shape[0]) // 2
        if not more:
            return gate_up
        return torch.cat([F.pad(half, (0, 0, 0, more)) for half in gate_up.chunk(2)])

    def _pad_columns(self, down: Tensor) -> Tensor:
        more = self._module.w2_weight.shape[2] - down.shape[1]
        return F.pad(down, (0, more)) if more else down

    def _multiply(self, packed: Tensor, x: Tensor) -> Tensor:
        """x @ W^T for the packed matrix W of each of some experts, exactly as the fused kernel multiplies.

        The kernel computes W (silu(G p) * (U p)). Here W is the matrix in question and G, U are a probe's: token i is
        the unit vector p_i, every element of G is 32 and column i of U is row i of x over 32, so that W meets x itself.
        """
        from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

        isa = self._module.quant_method.moe_kernel.fused_experts.isa
        experts, (tokens, columns) = len(packed), x.shape
        width = -(-tokens // 32) * 32  # the kernel's blocks
        probe = torch.zeros(1, 2 * columns, width, dtype=x.dtype)
        probe[0, :columns] = _GATE
        probe[0, columns:, :tokens] = x.t() / _GATE
        product = torch.empty(experts * tokens, packed.shape[1], dtype=x.dtype)
        cpu_fused_moe(
            product,
            torch.eye(width, dtype=x.dtype)[:tokens].repeat(experts, 1),
            cpu_prepack_moe_weight(probe, isa).repeat(experts, 1, 1),
            packed,
            None,
            None,
            torch.ones(len(product), 1),
            torch.arange(experts, dtype=torch.int32).repeat_interleave(tokens)[:, None],
            "silu",
            isa,
        )
        return product.view(experts, tokens, -1)

    def _prove_layer(self, x: Tensor, gate_up: Tensor, w2: Tensor, biases: Sequence[Tensor]) -> None:
        """The layer's own call gives each expert's own answer: the kernel reads these matrices and no others.

        Of the token x (hidden) each expert's gate and up projection (experts, padded rows) has been proven already.
        """
        module, numbers = self._module, self._numbers
        weight, expert_ids = torch.ones(len(numbers), 1), torch.tensor(numbers, dtype=torch.int32)[:, None]
        output = module.quant_method.apply(module, x.repeat(len(numbers), 1), weight, expert_ids, None, None).float()
        if self._module.w2_weight.shape[2] > w2.shape[2]:  # gates and ups are padded, each by itself
            gate_up = torch.cat([half[:, : w2.shape[2]] for half in gate_up.chunk(2, dim=1)], 1)
        bias13, bias2 = biases or (torch.zeros_like(gate_up), w2.new_zeros(w2.shape[:2]))
        tolerance = 16 * torch.finfo(x.dtype).eps + (len(x) + w2.shape[2]) ** 0.5 * torch.finfo(torch.float32).eps
        for slot, number in enumerate(numbers):
            inner = self._activation(gate_up[slot].float() + bias13[slot].float())
            expected = F.linear(inner, w2[slot].float(), bias2[slot].float())
            if not bool((output[slot] - expected).norm() <= tolerance * expected.norm()):
                raise not_held(f"{self._path}, expert {number}", w2[slot])


def packed_experts(path: str, module: Module) -> list[PackedExperts]:
    """What packs the parameters of this module: nothing where its kernel reads the plain ones."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel: Any = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return (
        [PackedExperts(path, module)]
        if isinstance(getattr(kernel, "fused_experts", None), CPUUnquantizedExperts)
        else []
    )


def mend_cpu_expert_parallel() -> None:
    """Let vLLM's CPU experts find their local slots.

    Under expert parallelism vLLM 0.32.0 indexes a CPU rank's experts by their number over the whole layer, beyond the
    end of its weights. Mended, an expert that lives on another rank counts with weight 0, like on a GPU.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply: Any = CPUUnquantizedExperts.apply
    if hasattr(apply, "__wrapped__"):
        return

    @functools.wraps(apply)
    def mended(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, **rest: Any) -> None:
        if expert_map is not None:
            slots = expert_map[topk_ids.long()]
            topk_weights, topk_ids = topk_weights.masked_fill(slots < 0, 0), slots.clamp(min=0)
        apply(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **rest)

    CPUUnquantizedExperts.apply = mended  # type: ignore[method-assign, assignment]
