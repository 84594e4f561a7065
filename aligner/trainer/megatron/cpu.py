"""Patches that let Megatron-core run without CUDA and without TransformerEngine; the only file that patches its modules.

On a CPU, `torch` and `torch.cuda` are replaced by stand-ins inside Megatron's own modules only; with CUDA nothing is replaced.
A global torch-function mode would be simpler, but costs a quarter of the time of a small step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from aligner.trainer.products import linear

_FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "eye",
    "as_tensor",
    "linspace",
]
_MODULES = [
    "tensor_parallel",
    "transformer.transformer_layer",
    "transformer.moe.moe_layer",
    "transformer.moe.token_dispatcher",
    "models.gpt.gpt_model",
    "distributed",
    "optimizer",
    "pipeline_parallel",
]


class _Stream:
    """A CUDA stream or event that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...

    def query(self) -> bool:
        return True


class _StandIn(types.ModuleType):
    """A module with some attributes replaced; all others are the real module's."""

    def __init__(self, real: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_real"], name, value)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _on_cpu(factory: Any) -> Any:
    """A tensor factory that makes CPU tensors for device="cuda" and ignores pin_memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _stand_in_torch() -> _StandIn:
    none = lambda *args, **kwargs: None  # noqa: E731
    scope = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: E731
    cuda = _StandIn(
        torch.cuda,
        {
            "current_device": lambda: torch.device("cpu"),
            "device_count": lambda: 1,
            "set_device": none,
            "synchronize": none,
            "empty_cache": none,
            "Stream": _Stream,
            "Event": _Stream,
            "stream": scope,
            "current_stream": lambda *args: _Stream(),
            "default_stream": lambda *args: _Stream(),
            "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
            "manual_seed": torch.manual_seed,
            "nvtx": types.SimpleNamespace(range_push=none, range_pop=none, range=scope),
        },
    )
    cuda.__dict__["random"] = cuda
    return _StandIn(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


def _patch_tensor_methods() -> None:
    """`.cuda()` and `.pin_memory()` return the tensor; `.type()` returns CUDA type names to Megatron's modules."""
    if hasattr(torch.Tensor.type, "_aligner"):
        return
    torch_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = torch_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and caller.startswith("megatron."):
            return result.replace("torch.", "torch.cuda.")  # compared with 'torch.cuda.FloatTensor'
        return result

    type_._aligner = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


def _install_cpu() -> None:
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    _patch_tensor_methods()
    stand_in = _stand_in_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and vars(module).get("torch") is torch:
            vars(module)["torch"] = stand_in
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    # Megatron converts token counts to numpy when it moves them to the host; on the host already, it leaves them tensors
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _install_linear()


def _install_linear() -> None:
    """Megatron's linear layers take `products.linear`, save under sequence parallelism, where they gather and scatter tokens."""
    import megatron.core.tensor_parallel.layers

    layers: Any = megatron.core.tensor_parallel.layers
    theirs = layers.LinearWithGradAccumulationAndAsyncCommunication
    if not issubclass(theirs, torch.autograd.Function):
        return

    class Linear:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
            _, sum_grad, sequence_parallel, _, _, group, *_ = settings  # 0.19 has one more than 0.16
            if sequence_parallel:
                return theirs.apply(x, weight, bias, *settings)  # type: ignore[no-any-return]
            return linear(x, weight, bias, group if sum_grad else None)

    layers.LinearWithGradAccumulationAndAsyncCommunication = Linear


def _leave_functions_uncompiled() -> None:
    """Megatron-core compiles small elementwise functions with torch.compile, which takes seconds at each new length of a
    microbatch; what matters of them stands in `fused`. Some are compiled already, where their module was imported before."""
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core.")]
    classes = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    owners: list[Any] = [*modules, *(one for one in classes if one.__module__.startswith("megatron."))]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            # functions alone: stand-ins for absent libraries have every attribute that they are asked for
            if isinstance(value, types.FunctionType) and "_torchdynamo_orig_callable" in vars(value):
                setattr(owner, name, value._torchdynamo_orig_callable)  # type: ignore[attr-defined]


def _l2_norm(chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool) -> Any:
    """(norm over all tensors [1], None): Megatron's own fallback copies the norm of each tensor to the host, one by one."""
    return torch.stack(torch._foreach_norm(tensors[0])).norm().view(1), None


def _install_without_transformer_engine() -> None:
    """Define names that Megatron-core uses but does not define without TransformerEngine."""
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as experts
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":  # neither TransformerEngine's nor Apex's
        clip_grads.l2_norm_impl = _l2_norm
    for name in ("te_general_gemm", "fused_permute", "fused_unpermute", "fused_sort_chunks_by_index"):
        if not hasattr(experts, name):
            setattr(experts, name, None)
    if not hasattr(rng, "FP8GlobalStateManager"):
        rng.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
        rng.activation_recompute_forward = lambda *args, **kwargs: contextlib.nullcontext()
        rng.fp8_autocast = lambda *args, **kwargs: contextlib.nullcontext()


def parameter_device() -> torch.device:
    """Where layers make their parameters, ours as Megatron's."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def install() -> None:
    """Patch Megatron-core for this machine. Call it after the world has started and before a model is built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that apex and TransformerEngine are absent
        import megatron.core  # noqa: F401

        _leave_functions_uncompiled()
        if not torch.cuda.is_available():
            _install_cpu()
        try:
            importlib.import_module("transformer_engine")
        except ImportError:
            _install_without_transformer_engine()
