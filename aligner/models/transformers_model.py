"""A model as transformers has it: its class, its parameters without values, and where these hold the checkpoint's tensors."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aligner.models.remote_code import loading_code, remote_class
from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import logical_tensors
from aligner.reshard.plan.region import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_PATIENCE = 10.0
"""Seconds in which a field of config.json is looked for that makes no model."""


@dataclass(frozen=True)
class HeldTensor:
    """A parameter of transformers' model, or a buffer that its checkpoints hold."""

    storage: str
    """Its name in the model."""
    shape: tuple[int, ...]
    trained: bool
    """A parameter; a buffer is not."""
    pieces: tuple[Piece, ...]
    """The checkpoint's tensors in it, whole, as float32: an expert's projection in the tensor of all experts, for example."""


@dataclass(frozen=True)
class HeadForm:
    """What a language model does with its final hidden states and their product with its output layer."""

    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """Logits become softcap x tanh(logits / softcap)."""


def read_config(path: str | Path, head: Head, trust_remote_code: bool = False) -> PreTrainedConfig:
    """transformers' configuration of the folder's model, with one label for a scalar head.

    Args:
        trust_remote_code: its class may be in a Python file of the folder.

    Raises:
        ValueError: transformers does not know the model.
    """
    from transformers import AutoConfig  # imported here: it takes a second

    try:
        with loading_code(path, trust_remote_code):
            config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the exception types differ between releases
        raise ValueError(f"{path}/config.json: transformers cannot read it: {' '.join(str(error).split())}") from error
    if head is Head.SCALAR:
        config.num_labels = 1
    config.return_dict = True  # old files may have chosen tuples
    return config


def model_class(
    config: PreTrainedConfig, head: Head, path: str | Path, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """transformers' class of this model with this head, or the folder's own. ValueError where there is none."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if head is Head.SCALAR else AutoModelForCausalLM
    own = remote_class(config, auto.__name__, path) if trust_remote_code else None
    kind = own or auto._model_mapping.get(type(config), None)
    if kind is None:
        what = "with a scalar head" if head is Head.SCALAR else "that is a language model"
        code = f", and its auto_map names no {auto.__name__}" if trust_remote_code else ""
        raise ValueError(
            f"{path}/config.json: transformers has no class of model_type={config.model_type!r} {what}{code}."
        )
    return kind[0] if isinstance(kind, list | tuple) else kind  # type: ignore[no-any-return]


def empty_model(
    path: str | Path,
    head: Head,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The folder's model with parameters that have shapes and no memory; buffers are as transformers computes them.

    Args:
        attention: name of an attention implementation that is registered with transformers; None: its default.
        dtype: of the parameters, but for those that transformers keeps in float32.
        trust_remote_code: its class may be in a Python file of the folder.

    Raises:
        ValueError: transformers does not know the model, or its class takes no such configuration.
    """
    config = read_config(path, head, trust_remote_code)
    kind = model_class(config, head, path, trust_remote_code)
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with _parameters_without_memory(), _own_constructors():
            model = kind._from_config(config, dtype=dtype, **more)
    except Exception as error:  # whatever a constructor runs into with values that its configuration class lets pass
        raise ValueError(
            f"{path}/config.json: transformers cannot make a {kind.__name__} of {_culprit(path, config, kind, dtype)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    _keep_float32(model, dtype)
    model.tie_weights()
    return use_own_calls(model).eval()


def _culprit(path: str | Path, config: PreTrainedConfig, kind: type[PreTrainedModel], dtype: torch.dtype) -> str:
    """The field of config.json with whose default value there would be a model: constructors' own errors may not name it."""
    fields = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    began = time.monotonic()
    for key, value in fields.items():
        if time.monotonic() - began > _PATIENCE:
            break
        try:
            with _parameters_without_memory(), _own_constructors():
                others = {name: fields[name] for name in fields if name != key}
                kind._from_config(type(config).from_dict(others), dtype=dtype)
        except Exception:
            continue
        return f"{key}={value!r}"
    return "it"


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the parameters and buffers that the class wants in float32 in a model of type `dtype`."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    wanted = build_glob_alternation(list(plan))[0]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, tensor in tensors if tensor.is_floating_point() and wanted.search(name)}


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """from_pretrained does that, and constructors do not."""
    for path in kept_in_float32(model, dtype):
        owner, _, name = path.rpartition(".")
        module, tensor = model.get_submodule(owner), getattr(model.get_submodule(owner), name)
        if isinstance(tensor, nn.Parameter):
            module._parameters[name] = nn.Parameter(tensor.float(), tensor.requires_grad)
        else:
            module._buffers[name] = tensor.float()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that modules register get no memory, while buffers, which no checkpoint may hold, keep their values."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        with _LargeWithoutMemory():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _LargeWithoutMemory(TorchFunctionMode):
    """Large tensors without values, which become parameters, never have memory: all experts of a layer may be more than a host has."""

    LARGE = 1 << 26
    """Elements."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            sizes = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args)
            if prod(sizes) >= self.LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _own_constructors() -> Iterator[None]:
    """transformers' classes with the constructors that they were defined with.

    vLLM's transformers backend wraps the constructor of a class in the process, and then makes it inside its engine alone.
    """
    from transformers import PreTrainedModel

    kinds: list[type] = [PreTrainedModel]
    for kind in kinds:
        kinds += kind.__subclasses__()
    wrapped = {
        kind: vars(kind)["__init__"]
        for kind in kinds
        if getattr(vars(kind).get("__init__"), "__module__", None) == "vllm.compilation.decorators"
    }
    try:
        for kind, init in wrapped.items():
            kind.__init__ = inspect.getclosurevars(init).nonlocals["old_init"]  # type: ignore[misc]
        yield
    finally:
        for kind, init in wrapped.items():
            kind.__init__ = init  # type: ignore[misc]


def use_own_calls(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with `__call__` of its transformers classes as torch has it.

    vLLM's transformers backend wraps `__call__` of transformers' class in the process, for its own instances.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            module.__class__ = type(
                kind.__name__, (kind,), {"__call__": nn.Module.__call__, "__module__": kind.__module__}
            )
    return model


def held_tensors(spec: ModelSpec) -> tuple[HeldTensor, ...]:
    """What transformers' model of `spec` consists of, in its order; equal on every rank.

    Raises:
        ValueError: transformers does not know the model, or converts a tensor of the checkpoint in ways that are no region
            of a parameter; the message names tensor and class.
    """
    changed_ns = (Path(spec.path) / "config.json").stat().st_mtime_ns
    held, shapes = _held_tensors(spec.path, spec.head, spec.trust_remote_code, changed_ns)
    expected = logical_tensors(spec)
    if shapes != expected:
        names = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{spec.path}: transformers' model has {names[0]} of shape {shapes.get(names[0])}, the checkpoint of "
            f"config.json {expected.get(names[0])}; use engine=megatron."
        )
    return held


def checkpoint_shapes(path: str | Path, head: Head, trust_remote_code: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Every tensor of the checkpoint of the folder's model, by name, as transformers would save it, with its shape."""
    return _held_tensors(str(path), head, trust_remote_code, (Path(path) / "config.json").stat().st_mtime_ns)[1]


@lru_cache(maxsize=8)
def _held_tensors(
    path: str, head: Head, trust_remote_code: bool, changed_ns: int
) -> tuple[tuple[HeldTensor, ...], dict[str, tuple[int, ...]]]:
    """(held, shapes by name); `changed_ns` tells versions of config.json apart."""
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_model(path, head, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters())
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved and value.is_floating_point()}
    held = {name: torch.empty(value.shape, device="meta") for name, value in {**parameters, **buffers}.items()}
    names = {tensor.untyped_storage()._cdata: name for name, tensor in held.items()}
    try:
        with _CopiesAreViews():
            stored = revert_weight_conversion(model, dict(held))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__}: its tensors cannot be traced to those of its checkpoints: {error}"
        ) from error
    pieces: dict[str, list[Piece]] = {name: [] for name in held}
    for tensor, view in stored.items():
        name = names.get(view.untyped_storage()._cdata)
        if name is None:
            raise ValueError(
                f"{type(model).__name__} computes {tensor} of its checkpoints from several of its parameters, which is not "
                "supported by engine=fsdp."
            )
        piece = Piece(
            tensor, (0,) * view.dim(), tuple(view.shape), name, int(view.storage_offset()), view.stride(), "float32"
        )
        pieces[name].append(piece)
    for name, tensor in held.items():
        if sum(piece.elements for piece in pieces[name]) != tensor.numel():
            raise ValueError(
                f"{type(model).__name__}: the tensors of its checkpoints do not make up its parameter {name}, which is not "
                "supported by engine=fsdp."
            )
    return (
        tuple(HeldTensor(name, tuple(t.shape), name in parameters, tuple(pieces[name])) for name, t in held.items()),
        {tensor: tuple(view.shape) for tensor, view in stored.items()},
    )


def stored_name(model: PreTrainedModel, name: str) -> str:
    """The checkpoint's name of a parameter that is a tensor of it, such as an embedding."""
    from transformers.core_model_loading import revert_weight_conversion

    return next(iter(revert_weight_conversion(model, {name: torch.empty(1, 1, device="meta")})))


class _CopiesAreViews(TorchDispatchMode):
    """A copy of a tensor without memory is the tensor: only where its elements come from matters."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0].view(args[0].shape) if args[0].is_contiguous() else args[0].transpose(0, 0)
        return func(*args, **(kwargs or {}))


def head_form(model: PreTrainedModel) -> HeadForm:
    """What a language model does with its final hidden states before and after its output layer, observed in its own forward
    pass without memory.

    Raises:
        ValueError: anything but factors and a soft-capping, or an output layer with a bias.
    """
    name, output, base = type(model).__name__, model.get_output_embeddings(), model.base_model
    if not isinstance(output, nn.Linear) or output.bias is not None or base is model:
        raise ValueError(f"{name}: its output layer is no matrix alone, which is not supported by engine=fsdp.")
    hidden = torch.empty(1, 2, output.in_features, device="meta", dtype=output.weight.dtype)
    tokens, operations = torch.zeros(1, 2, dtype=torch.long, device="meta"), _Operations()
    before: list[tuple[str, Any]] = []
    after: list[tuple[str, Any]] = []

    def begin(*_: Any) -> None:  # the last of the model's parts to return has the layers
        before.clear()
        operations.noted = before

    base.forward = lambda *_, **__: _BaseOutput(hidden)
    parts = [module for module in model.modules() if module is not model and isinstance(module, _model_type())]
    hooks = [
        *(part.register_forward_hook(begin) for part in parts),
        output.register_forward_pre_hook(lambda *_: setattr(operations, "noted", None)),
        output.register_forward_hook(lambda *_: setattr(operations, "noted", after)),
    ]
    try:
        with torch.no_grad(), operations:
            model(input_ids=tokens, use_cache=False)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{name}: what it does with its output layer cannot be observed: {error}") from error
    finally:
        del base.forward
        for hook in hooks:
            hook.remove()
    form = _form(before, after)
    if form is None:
        raise ValueError(
            f"{name} computes its logits by {', '.join(operation for operation, _ in (*before, *after))} around the output "
            "layer, which is not supported by engine=fsdp."
        )
    return form


def _model_type() -> type[PreTrainedModel]:
    from transformers import PreTrainedModel

    return PreTrainedModel


def _form(before: Sequence[tuple[str, Any]], after: Sequence[tuple[str, Any]]) -> HeadForm | None:
    """The form of operations on the final hidden states, and then on the logits; None: it has another."""
    scale, cap, factors = 1.0, None, [*before, *after]
    match after:
        case [*earlier, ("div", float() | int() as first), ("tanh", _), ("mul", second)] if first == second:
            cap, factors = float(first), [*before, *earlier]
    for operation, factor in factors:
        if operation not in ("mul", "div") or not isinstance(factor, float | int) or not factor:
            return None
        scale = scale * factor if operation == "mul" else scale / factor
    return HeadForm(scale, cap)


class _BaseOutput:
    """What the layers return, of any class of model outputs: the final hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


class _Operations(TorchDispatchMode):
    """Notes what is computed, but for views and changes of the data type."""

    _VIEWS = ("view", "alias", "slice", "detach", "unsqueeze", "_to_copy", "_unsafe_view", "select", "expand", "clone")

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, Any]] | None = None
        """(operation, its second argument); None: nothing is noted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0].rstrip("_")
        if self.noted is not None and name not in self._VIEWS:
            self.noted.append((name, args[1] if len(args) > 1 else None))
        return func(*args, **(kwargs or {}))
