"""The engine's weights as the destination of a transfer: written plain, re-laid out by the engine, proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from aligner.reshard.region import Box, Piece, intersect
from aligner.reshard.storage import strided_view
from aligner.rollout.dry_run import Slot, dry_run
from aligner.rollout.engine import RolloutEngine

EXACT_PROBE_PRODUCTS = 1 << 24
"""Multiplications spent on proving one packed weight exactly, about 1 ms on one core."""


class EngineWeights:
    """Writable regions of a `RolloutEngine`'s parameters; implements `aligner.reshard.executor.Destination`.

    On a CPU vLLM packs linear weights for its kernels and drops the plain ones. So a packed weight's plain storage is
    made when its first region is written; when all are, vLLM packs it again, the packed kernel is proven against the
    plain weight, and the plain one goes. At most the modules being written are in memory twice.

    On CUDA unquantized weights stay plain: regions are written in place, which keeps CUDA graphs valid, and nothing is
    packed or probed; there the executor's checksums read the very storage that the kernels read.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._pieces: list[Piece] | None = None
        self._slots: dict[str, Slot] = {}
        self._kernels: dict[str, tuple[tuple[str, Module], ...]] = {}
        self._sync = _Progress()
        self._syncs = 0

    def pieces(self, logical: Mapping[str, Sequence[int]]) -> list[Piece]:
        """The regions of the logical tensors (name -> shape) that this rank's engine holds, found once.

        Raises ValueError where the engine and the tensors do not match; see `dry_run`.
        """
        if self._pieces is None:
            model = self._engine.model
            with self._engine.inside():
                outcome = dry_run(model, logical, getattr(torch, self._engine.config.dtype))
                self._slots = outcome.slots
                self._kernels = {storage: _kernels(model, slot) for storage, slot in self._slots.items()}
                _forget_embedding_kernel(model)
                _clear_padding(self._slots)
            self._pieces = outcome.pieces
        return self._pieces

    def view(self, piece: Piece) -> Tensor:
        """A writable view of the region in plain storage; from here until `finish` the engine has no valid weights."""
        assert self._pieces is not None, "pieces() comes first"
        if piece.storage in self._sync.complete:
            raise RuntimeError(f"reshard: {piece.name}{piece.box} for {piece.storage}, which is complete already")
        self._engine.ready = False
        return strided_view(self._plain(piece.storage), piece)

    def written(self, piece: Piece) -> None:
        """Count the region as written; the last one of a parameter makes the engine pack it, and proves that.

        Raises RuntimeError where a region comes twice or the engine's kernel does not hold what was written.
        """
        self._sync.add(piece)
        slot = self._slots[piece.storage]
        if self._sync.elements[piece.storage] < slot.plain.numel() - slot.padding:
            return
        with self._engine.inside():
            self._complete(slot)
        self._sync.complete.add(piece.storage)
        self._sync.plain.pop(piece.storage, None)

    def finish(self) -> None:
        """Every region was written once: forget cached prefixes and let the engine generate.

        Raises RuntimeError naming the tensor otherwise.
        """
        sync, self._sync = self._sync, _Progress()
        self._syncs += 1
        for piece in self._pieces or ():
            if piece.storage not in sync.complete:
                done = sum(box.elements for box in sync.boxes.get((piece.storage, piece.name), ()))
                total = sum(
                    one.elements for one in self._pieces or () if (one.storage, one.name) == (piece.storage, piece.name)
                )
                if done < total:
                    raise RuntimeError(f"reshard: {total - done} of {total} elements of {piece.name} were not written")
        self._engine.reset_prefix_cache()
        self._engine.ready = True

    def discard(self) -> None:
        """Give up a transfer that failed; the engine has no valid weights until the next one succeeds."""
        self._sync = _Progress()

    def _plain(self, storage: str) -> Tensor:
        slot = self._slots[storage]
        live = slot.module._parameters[slot.parameter]
        assert live is not None
        if live.shape == slot.plain.shape:
            return live.detach()
        if storage not in self._sync.plain:
            self._sync.plain[storage] = torch.zeros(
                slot.plain.shape, dtype=slot.plain.dtype, device=self._engine.device
            )
        return self._sync.plain[storage]

    def _complete(self, slot: Slot) -> None:
        plain = self._plain(slot.storage)
        for path, module in self._kernels[slot.storage]:
            dropped = module._parameters[slot.parameter]
            assert dropped is not None
            if dropped.shape != plain.shape:
                module._parameters[slot.parameter] = Parameter(plain, requires_grad=False)
            _pack(module)
            _prove(path, module, plain, self._syncs)


@dataclass
class _Progress:
    """What has been written in one transfer."""

    plain: dict[str, Tensor] = field(default_factory=dict)
    boxes: dict[tuple[str, str], list[Box]] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)

    def add(self, piece: Piece) -> None:
        boxes = self.boxes.setdefault((piece.storage, piece.name), [])
        if any(intersect(piece.box, box) for box in boxes):
            raise RuntimeError(f"reshard: {piece.name}{piece.box} was written twice into {piece.storage}")
        boxes.append(piece.box)
        self.elements[piece.storage] = self.elements.get(piece.storage, 0) + piece.elements


def _kernels(model: Module, slot: Slot) -> tuple[tuple[str, Module], ...]:
    """The modules that packed this parameter: its own, and a tied output layer, which packs its own copy."""
    live = slot.module._parameters[slot.parameter]
    if slot.parameter != "weight":
        return ()
    return tuple(
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "cpu_linear")
        and not _only_embeds(model, module)
        and module._parameters.get("weight") is live
    )


def _only_embeds(model: Module, module: Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeds = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    return embeds and getattr(model, "lm_head", None) is not module


def _forget_embedding_kernel(model: Module) -> None:
    """vLLM packs the input embedding too, which only ever looks rows up: a stale copy nobody may read."""
    for path, module in model.named_modules():
        if hasattr(module, "cpu_linear") and _only_embeds(model, module):
            module.cpu_linear = _Unusable(path)


class _Unusable:
    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *_: object) -> Tensor:
        raise RuntimeError(f"the rollout engine multiplies by {self._path}, whose weights are kept for look-ups only")


def _clear_padding(slots: Mapping[str, Slot]) -> None:
    """vLLM's placeholder weights fill the rows that round the vocabulary up, too; its loaders would zero them."""
    for slot in slots.values():
        live = slot.module._parameters[slot.parameter]
        if slot.padding and live is not None and live.shape == slot.plain.shape:
            live.detach().view(-1)[-slot.padding :].zero_()


def _pack(module: Any) -> None:
    module.quant_method.process_weights_after_loading(module)


def _prove(path: str, module: Module, plain: Tensor, round_: int) -> None:
    """Raise RuntimeError unless the module's packed kernel multiplies by `plain`.

    Unit vectors read columns of the packed weight back exactly, in any data type: all of them where that is cheap, else
    a window that moves on at every transfer. A random vector covers the rest to rounding.
    """
    rows, columns = plain.shape
    count = min(columns, max(8, EXACT_PROBE_PRODUCTS // plain.numel()))
    window = (torch.arange(count) + round_ * count) % columns
    unit = torch.zeros(count, columns, dtype=plain.dtype)
    unit[torch.arange(count), window] = 1
    exact = torch.equal(_kernel(module, unit), plain[:, window].t())
    noise = torch.randn(2, columns, generator=torch.Generator().manual_seed(round_)).to(plain.dtype)
    expected = F.linear(noise.float(), plain.float())
    scale = noise.float().norm(dim=1)[:, None] * torch.linalg.vector_norm(plain, dim=1, dtype=torch.float32)[None]
    bound = (8 + columns**0.5) * torch.finfo(plain.dtype).eps * scale
    close = bool(((_kernel(module, noise).float() - expected).abs() <= bound).all())
    if not (exact and close):
        cause = (
            "what was written"
            if torch.isfinite(plain).all()
            else "finite numbers: NaN or infinite weights were written"
        )
        raise RuntimeError(
            f"reshard: the rollout engine's packed kernel of {path} ({rows} x {columns}) does not hold {cause}"
        )


def _kernel(module: Any, x: Tensor) -> Tensor:
    product: Tensor = module.quant_method.apply(module, x, None)
    return product
