"""A device that is not the host, in Python: its tensors hold their values in host memory, and what a GPU would refuse is refused.

`torch.device("standin", 0)` stands where a job on GPUs has `torch.device("cuda", 0)`: tensors are made on it, computed on it and
differentiated, and collectives run over gloo on what they hold. As with CUDA, an operation that mixes tensors of the device with
tensors of the host raises, but for copies, scalars of no dimensions and indices on the host. Each collective is noted with its
process group and the kind of device that its tensors are on, and each time that the host waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
MIXES = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::_index_put_impl_")
"""Operations that take tensors of both: copies, and indices on the host."""
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
"""Operations whose result the host waits for."""


class OnDevice(torch.Tensor):
    """A tensor on the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Log())

    def type(self, *args: Any, **kwargs: Any) -> Any:
        """The name that Megatron's optimizer looks for."""
        return super().type(*args, **kwargs) if args or kwargs else self.held.type().replace("torch.", "torch.cuda.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """For Megatron's experts, whose numbers of tokens our patches for CPUs leave where they are."""
        return self.cpu().numpy()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnDevice) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held


@dataclass
class Log:
    """What was done with the device."""

    collectives: list[tuple[str, str, str]] = field(default_factory=list)
    """(operation, name of the process group, host or device), in order."""
    waits: Counter[str] = field(default_factory=Counter)
    """Operation -> how often the host waited for the device."""


def run(func: Any, args: Any, kwargs: dict[str, Any], log: Log) -> Any:
    """An operation of torch, on what the tensors hold."""
    name, target = func._schema.name, kwargs.get("device")
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in given if isinstance(tensor, OnDevice)]
    collective = name.startswith("c10d::") and bool(given)
    others = [one for one in given if not isinstance(one, OnDevice) and (collective or one.dim())]
    if ours and others and not name.startswith(MIXES):
        shapes = [(one.device.type, tuple(one.shape)) for one in given]
        raise RuntimeError(f"{name}: tensors of the host and of the device: {shapes}")
    if collective:
        log.collectives.append((name.removeprefix("c10d::"), _group_of(args), "device" if ours else "host"))
    if name == "aten::_fused_sdp_choice":
        return 0  # mathematics: the others are kernels for one kind of device
    if name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    else:
        on_device = bool(ours) if target is None else target.type == NAME
    if ours and (name in WAITS or (not on_device and name in ("aten::copy_", "aten::_to_copy"))):
        log.waits[name] += 1
    if target is not None and target.type == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(tensor.held): tensor for tensor in ours}
    plain_args, plain_kwargs = pytree.tree_map_only(OnDevice, lambda tensor: tensor.held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)

    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in known:  # of an operation in place
            return known[id(tensor)]
        return OnDevice(tensor) if on_device else tensor

    return pytree.tree_map_only(torch.Tensor, wrapped, result)


def _group_of(args: Any) -> str:
    """The name of a collective's process group."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return str(dist.ProcessGroup.unbox(value).group_name)
    return ""


class Device(TorchDispatchMode):
    """Context in which the device is there; `log` has what was done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self._plain_tensor = torch.tensor

    def __enter__(self) -> Device:
        torch.tensor = self._tensor  # its own way to a device goes past dispatch
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self._plain_tensor
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.log)

    def _tensor(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        # of a list of tensors, each is waited for
        args = pytree.tree_map_only(OnDevice, lambda tensor: tensor.tolist(), args)
        made = self._plain_tensor(*args, **kwargs)
        return made if device is None else made.to(device)


def install() -> None:
    """Make the device known to torch; once in a process, and for good."""
    _setup_privateuseone_for_python_backend(NAME)


def without(kind: type[torch.Tensor]) -> Any:
    """The `__new__` of torch's own subclass of tensors, which cannot be made under a dispatch mode."""

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return torch.Tensor.__new__(cls)

    return make


@contextmanager
def cuda_in_megatron() -> Iterator[None]:
    """Where Megatron-core says cuda it gets the stand-in, not the host; around the building of the first model."""
    from aligner.trainer.megatron import cpu, grouped_experts, layers

    plain_tensor, stand_in = torch.tensor, cpu._stand_in_torch

    def on_device(factory: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = torch.device(NAME, 0)
            return (torch.tensor if factory is plain_tensor else factory)(*args, **kwargs)

        return make

    def with_device() -> Any:
        made = stand_in()
        made.cuda.__dict__["current_device"] = lambda: torch.device(NAME, 0)
        return made

    here = lambda: torch.device(NAME, 0)  # noqa: E731
    with (
        patch.object(cpu, "_on_cpu", on_device), patch.object(cpu, "_stand_in_torch", with_device),
        patch.object(layers, "parameter_device", here), patch.object(grouped_experts, "parameter_device", here),
    ):  # fmt: skip
        yield
