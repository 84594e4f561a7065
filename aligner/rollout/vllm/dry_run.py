"""Which region of which logical tensor each engine parameter holds, learnt from vLLM's own weight loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from aligner.reshard.plan.block_scales import Shapes, scale_shapes
from aligner.reshard.plan.region import STORED_BYTES, Piece, contiguous_stride
from aligner.rollout.vllm.experts import ACTIVATIONS

_NONE: Shapes = MappingProxyType({})


@dataclass(frozen=True)
class Slot:
    """One engine parameter as the loaders know it: its plain shape, before any packing."""

    storage: str
    """"module.path:parameter"."""
    module: Module
    parameter: str
    plain: Tensor
    """Meta tensor of the plain shape and dtype."""
    padding: int
    """Elements at the end that no checkpoint fills: the rows that round the vocabulary up."""

    @property
    def named(self) -> str:
        """The parameter, with the class of its module, for errors."""
        return f"{self.storage} ({type(self.module).__name__})"


@dataclass
class DryRun:
    """The outcome: the engine's parameters and what feeds them, both in the order of the model's modules."""

    slots: dict[str, Slot] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    """Tensors of experts and of pipeline stages that live on other ranks of the replica."""


def dry_run(
    model: Module, logical: Mapping[str, Sequence[int]], dtype: torch.dtype, quantized: Shapes = _NONE
) -> DryRun:
    """Run `model.load_weights` on tensors without storage and note every copy that it makes.

    Args:
        model: vLLM's model; it is unchanged afterwards.
        logical: name -> shape of every tensor of the checkpoint.
        dtype: the engine's data type.
        quantized: name -> shape of those tensors that the engine keeps in FP8; their scales are tensors of their own.

    Raises ValueError naming a parameter that no tensor feeds, a tensor that feeds no parameter, or a layer whose
    weights the engine re-lays out in ways that are not supported here.
    """
    scales = scale_shapes(quantized)
    shapes = {name: tuple(shape) for name, shape in logical.items()} | scales
    dtypes = dict.fromkeys(quantized, torch.float8_e4m3fn) | dict.fromkeys(scales, torch.float32)
    with _plain_parameters(model) as slots, torch.no_grad():
        recorder = _Recorder(
            slots,
            {name: torch.empty(shape, dtype=dtypes.get(name, dtype), device="meta") for name, shape in shapes.items()},
        )
        with recorder:
            model.load_weights(list(recorder.sources.items()))  # type: ignore[operator]
    experts, stages, unused = _experts_held(model), _missing_modules(model), set(shapes) - recorder.used
    elsewhere = sorted(name for name in unused if _lives_elsewhere(name, experts, stages))
    nowhere = sorted(unused.difference(elsewhere))
    if nowhere:
        raise ValueError(
            f"the rollout engine has no parameter for tensor {nowhere[0]}{_more(nowhere)}; "
            "is tie_word_embeddings in the model's config.json right?"
        )
    order = {storage: index for index, storage in enumerate(slots)}
    pieces = sorted(recorder.pieces, key=lambda piece: order[piece.storage])
    _check_coverage(slots, pieces)
    return DryRun(slots, pieces, elsewhere)


def _lives_elsewhere(name: str, experts: Mapping[str, set[int]], stages: tuple[str, ...]) -> bool:
    """Whether other ranks of the replica hold the tensor: whole experts, or a pipeline stage's modules."""
    prefix, dots, rest = name.rpartition(".experts.")
    here, expert = experts.get(prefix + dots), rest.split(".")[0]
    return name.startswith(stages) or (here is not None and expert.isdecimal() and int(expert) not in here)


def _experts_held(model: Module) -> dict[str, set[int]]:
    """The experts of each layer on this rank, by the prefix of their tensors; only layers that hold a part of them."""
    local_experts = {}
    for path, module in model.named_modules():
        slots = getattr(module, "expert_map", None)  # expert -> local slot, or -1
        if isinstance(slots, Tensor):
            local_experts[path.removesuffix("routed_experts")] = set((slots >= 0).nonzero()[:, 0].tolist())
    return local_experts


def _missing_modules(model: Module) -> tuple[str, ...]:
    """Prefixes of the tensors of other pipeline stages."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, PPMissingLayer))


def is_derived(module: Module, name: str) -> bool:
    """Whether an attention layer has computed the parameter from another module's: the absorbed projections of latent
    attention (MLA), which `process_weights_after_loading` makes anew."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return is_deferred_attention_layer(module) and name not in get_layerwise_info(module).restore_metadata[0]


@contextmanager
def _plain_parameters(model: Module) -> Iterator[dict[str, Slot]]:
    """The model with every parameter as its loader expects it, without storage: packed ones have lost their shape."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    slots: dict[str, Slot] = {}
    shared: dict[int, Tensor] = {}
    live = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        for path, module in model.named_modules():
            recorded = get_layerwise_info(module).restore_metadata[0]
            for name, parameter in module._parameters.items():
                if parameter is None or is_derived(module, name):
                    continue
                if id(parameter) in shared:  # a tied output layer
                    module._parameters[name] = shared[id(parameter)]  # type: ignore[assignment]
                    continue
                plain = restore_layer_refs(to_meta_tensor(recorded.get(name, parameter)), module)
                module._parameters[name] = shared[id(parameter)] = plain  # type: ignore[assignment]
                slots[f"{path}:{name}"] = Slot(f"{path}:{name}", module, name, plain, _padding(module, plain))
        yield slots
    finally:
        for module, parameters in live:
            module._parameters.update(parameters)


def _padding(module: Module, plain: Tensor) -> int:
    shard: Any = getattr(module, "shard_indices", None)
    if shard is None or plain.dim() == 0:
        return 0
    rows = plain.shape[0] - shard.num_org_elements
    return rows * (plain.numel() // plain.shape[0])


class _Recorder(TorchDispatchMode):
    """Notes each copy from a view of a source into a view of a slot; views of a meta tensor share its storage."""

    def __init__(self, slots: Mapping[str, Slot], sources: dict[str, Tensor]) -> None:
        super().__init__()
        self.sources = sources
        self.pieces: list[Piece] = []
        self.used: set[str] = set()
        self._slots = {_storage_id(slot.plain): slot for slot in slots.values()}
        self._names = {_storage_id(tensor): name for name, tensor in sources.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        if func is torch.ops.aten.zero_.default and (name := self._names.get(_storage_id(args[0]))):
            raise ValueError(
                f"the rollout engine sets {name} to 0 on ranks that should add it once, which is not supported; use "
                "placement.rollout.tensor=1."
            )
        if func is torch.ops.aten.clone.default and args[0].is_meta:
            return args[0].transpose(0, 0) if args[0].dim() else args[0]  # a copy holds the same elements
        return func(*args, **(kwargs or {}))

    def _note(self, target: Tensor, source: Tensor) -> None:
        slot, name = self._slots.get(_storage_id(target)), self._names.get(_storage_id(source))
        if slot is None and name is None:
            return
        if slot is None or name is None or target.shape != source.shape:
            what = name or "a tensor computed from the checkpoint's"
            raise ValueError(
                f"the rollout engine does not copy {what} as it is into {slot.named if slot else 'a parameter'}; "
                "this kind of model is not supported."
            )
        self.used.add(name)
        if target.numel() == 0:
            return  # a rank beyond the end of a small vocabulary
        lo, size, stride = _box(name, self.sources[name].shape, source, target, slot)
        dtype = str(slot.plain.dtype).removeprefix("torch.")
        if dtype not in STORED_BYTES:
            raise ValueError(
                f"rollout engine: {slot.storage} is {dtype}; only {', '.join(STORED_BYTES)} are supported."
            )
        self.pieces.append(Piece(name, lo, size, slot.storage, int(target.storage_offset()), stride, dtype))


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _box(
    name: str, shape: Sequence[int], source: Tensor, target: Tensor, slot: Slot
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The box (lo, size) of a tensor of this shape that the view `source` shows; the strides of `target` over it."""
    steps = contiguous_stride(shape)
    size, stride = [1] * len(shape), [1] * len(shape)
    for extent, step, target_step in zip(source.shape, source.stride(), target.stride(), strict=True):
        if extent > 1:
            # Steps of dimensions longer than 1 differ from each other, so at most one of them matches.
            dims = [dim for dim, length in enumerate(shape) if length > 1 and steps[dim] == step]
            if not dims:
                raise _no_box(name, slot)
            size[dims[0]], stride[dims[0]] = extent, target_step
    lo, rest = [], source.storage_offset()
    for step in steps:
        lo.append(rest // step)
        rest %= step
    for dim, length in enumerate(shape):
        if lo[dim] + size[dim] > length:
            raise _no_box(name, slot)
    return tuple(lo), tuple(size), tuple(stride)


def _no_box(name: str, slot: Slot) -> ValueError:
    return ValueError(
        f"the rollout engine loads {name} into {slot.named} in a form that is no box of it; this is not supported."
    )


def _check_coverage(slots: Mapping[str, Slot], pieces: Sequence[Piece]) -> None:
    filled = dict.fromkeys(slots, 0)
    for piece in pieces:
        filled[piece.storage] += piece.elements
    for storage, slot in slots.items():
        missing = slot.plain.numel() - slot.padding - filled[storage]
        if missing > 0:
            raise ValueError(
                f"no tensor of the checkpoint fills {missing} of the {slot.plain.numel()} elements of the rollout "
                f"engine's parameter {slot.named}; does the model's config.json describe this checkpoint?"
            )
        if missing < 0:
            names = sorted({piece.name for piece in pieces if piece.storage == storage})
            raise ValueError(
                f"{' and '.join(names)} both fill the rollout engine's parameter {slot.named}; "
                "is tie_word_embeddings in the model's config.json right?"
            )
        _check_method(slot)


def _check_method(slot: Slot) -> None:
    """Only layers whose re-layout `EngineWeights` repeats and proves."""
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if hasattr(slot.module, "_cpu_unpacked_conv_weight"):  # its shape is that of the plain one
        raise ValueError(
            f"the rollout engine's layer {slot.storage} repacks the weights of a convolution for its CPU kernel in bfloat16, which a "
            "weight sync does not do again; use rollout.engine=transformers."
        )
    method: Any = getattr(slot.module, "quant_method", None)
    if method is None or isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        return
    if _keeps_fp8_plain(method):
        return
    layer = f"the rollout engine's layer {slot.storage} ({type(slot.module).__name__}, {type(method).__name__})"
    if not isinstance(method, UnquantizedFusedMoEMethod):
        raise ValueError(f"{layer} is not supported; use a model without quantization.")
    known = {UnquantizedMoeBackend.CPU: (*ACTIVATIONS,), UnquantizedMoeBackend.TRITON: ("silu",)}
    activation = method.moe.activation.value
    if activation not in known.get(method.unquantized_backend, ()):
        works = " or ".join(f"{' and '.join(names)} by {backend.value}" for backend, names in known.items())
        raise ValueError(
            f"{layer} computes {activation} by {method.unquantized_backend.value}, which is not supported; use {works}."
        )


def _keeps_fp8_plain(method: Any) -> bool:
    """Whether a layer computes with FP8 weights and scales as its loader writes them: DeepGEMM's and Marlin's kernels re-lay them out."""
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

    if isinstance(method, Fp8MoEMethod):
        return method.block_quant and method.fp8_backend is Fp8MoeBackend.TRITON
    plain = Fp8BlockScaledMMLinearKernel.process_weights_after_loading  # changes nothing on CUDA
    return isinstance(method, Fp8LinearMethod) and type(method.fp8_linear).process_weights_after_loading is plain


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
