"""Linear layers whose weights vLLM prepacks for its CPU kernels: repacked after a weight sync, verified through the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

EXACT_PROBE_PRODUCTS = 1 << 22
"""Multiplications spent on proving one packed parameter exactly, about 0.1 ms on one core."""

_CACHED_ELEMENTS = 1 << 18
"""Weights that are multiplied at once: 1 MiB in fp32."""


class PrepackedModule(Protocol):
    """A module whose kernel reads prepacked weights, not the ones that vLLM's weight loaders write."""

    storages: tuple[str, ...]
    """Names of the unpacked weights it is packed from."""

    def pack(self, plain: Mapping[str, Tensor]) -> None:
        """Pack the unpacked weights `plain` (name -> tensor) for the kernel."""

    def prove(self, plain: Mapping[str, Tensor], round_: int) -> None:
        """Raises RuntimeError naming the module unless its kernel computes with `plain`; `round_` counts the syncs."""


class PackedLinear:
    """A linear layer, or an output layer that is tied and packs its own copy of the embedding."""

    def __init__(self, path: str, module: Module, storage: str) -> None:
        self.storages: tuple[str, ...] = (storage,)
        self._path, self._module = path, module

    def pack(self, plain: Mapping[str, Tensor]) -> None:
        module: Any = self._module
        (weight,) = plain.values()
        if module.weight.shape != weight.shape:  # packing has dropped it
            module._parameters["weight"] = Parameter(weight, requires_grad=False)
        module.quant_method.process_weights_after_loading(module)

    def prove(self, plain: Mapping[str, Tensor], round_: int) -> None:
        (weight,) = plain.values()
        rows, columns = weight.shape
        probes = probes_for(rows, columns, weight.dtype, round_, EXACT_PROBE_PRODUCTS)
        module: Any = self._module
        if not probes.held(module.quant_method.apply(module, probes.vectors, None), weight):
            raise not_held(self._path, weight)


class Probes(NamedTuple):
    """Vectors that a kernel multiplies by W^T, to read back which W it holds."""

    vectors: Tensor
    """(probes, columns): unit vectors, with two random ones below."""
    exact: slice
    """The columns read back exactly, by unit vectors: a window that moves on at every sync."""
    noise: Tensor
    """The random vectors, in fp32."""

    def held(self, products: Tensor, plain: Tensor) -> bool:
        """Whether `products` (probes, rows) is what W = `plain` gives, summed in fp32 and rounded to plain's data type.

        Unit vectors read columns back exactly, in any data type. The random vectors cover the rest to rounding.
        """
        count, columns = len(products) - len(self.noise), plain.shape[1]
        if not torch.equal(products[:count], plain[:, self.exact].t()):
            return False
        expected, norms = _expected(self.noise, plain)
        rounding = 4 * torch.finfo(plain.dtype).eps * expected.abs()
        sums = (8 + columns**0.5) * torch.finfo(torch.float32).eps * self.noise.norm(dim=1)[:, None] * norms
        return bool(((products[count:].float() - expected).abs() <= rounding + sums).all())


def probes_for(rows: int, columns: int, dtype: torch.dtype, round_: int, products: int) -> Probes:
    """Probes of a matrix: as many unit vectors as `products` multiplications pay for, and 8 at least."""
    count = min(columns, max(8, products // (rows * columns)))
    return _probes(columns, count, min(round_ * count % columns, columns - count), dtype, round_)


@lru_cache(maxsize=16)
def _probes(columns: int, count: int, start: int, dtype: torch.dtype, round_: int) -> Probes:
    vectors = torch.zeros(count + 2, columns, dtype=dtype)
    vectors[:count, start : start + count] = torch.eye(count, dtype=dtype)
    vectors[count:] = torch.randn(2, columns, generator=torch.Generator().manual_seed(round_))
    return Probes(vectors, slice(start, start + count), vectors[count:].float())


def _expected(noise: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """noise @ plain^T and the norms of plain's rows, in fp32; as many rows at a time as stay in the cache."""
    products, norms = [], []
    for part in plain.split(max(1, _CACHED_ELEMENTS // plain.shape[1])):
        rows = part.float()
        products.append(F.linear(noise, rows))
        norms.append(torch.linalg.vector_norm(rows, dim=1))
    return torch.cat(products, 1), torch.cat(norms)


def not_held(matrix_name: str, plain: Tensor) -> RuntimeError:
    """The error for a kernel that holds other weights than `plain`."""
    finite = torch.isfinite(plain).all()
    cause = "what was written" if finite else "finite numbers: NaN or infinite weights were written"
    shape = " x ".join(map(str, plain.shape))
    return RuntimeError(f"reshard: the rollout engine's packed kernel of {matrix_name} ({shape}) does not hold {cause}")


def packed_linears(model: Module, storage: str, module: Module, parameter: str) -> list[PackedLinear]:
    """The modules that pack this parameter: its own, and a tied output layer, which packs its own copy."""
    live = module._parameters[parameter]
    if parameter != "weight":
        return []
    return [
        PackedLinear(path, other, storage)
        for path, other in model.named_modules()
        if hasattr(other, "cpu_linear") and not _only_embeds(model, other) and other._parameters.get("weight") is live
    ]


def forget_embedding_kernel(model: Module) -> None:
    """vLLM packs the input embedding too, which only ever looks rows up: a stale copy nobody may read."""
    for path, module in model.named_modules():
        if hasattr(module, "cpu_linear") and _only_embeds(model, module):
            module.cpu_linear = _Unusable(path)


def _only_embeds(model: Module, module: Module) -> bool:
    """An input embedding, unless it is the output layer too: as `lm_head`, or in a model that has none."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeds = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    return embeds and getattr(model, "lm_head", module) is not module


def drop_kernels(model: Module) -> None:
    """Free all packed weights; the next sync packs them again."""
    for path, module in model.named_modules():
        if hasattr(module, "cpu_linear") and not isinstance(module.cpu_linear, _Unusable):
            module.cpu_linear = _Unusable(path, "were given up; reshard to it first")


class _Unusable:
    def __init__(self, path: str, why: str = "are kept for look-ups only") -> None:
        self._path, self._why = path, why

    def __call__(self, *_: object) -> Tensor:
        raise RuntimeError(f"the rollout engine multiplies by {self._path}, whose weights {self._why}")
