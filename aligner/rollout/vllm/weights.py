"""The engine's weights as the destination of a transfer: written plain, re-laid out by the engine, proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn import Module

from aligner.models.tensors import logical_tensors
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.region import Piece
from aligner.rollout.quantization import quantized_tensors
from aligner.rollout.vllm.dry_run import DryRun, Slot, dry_run, is_derived
from aligner.rollout.vllm.experts import packed_experts
from aligner.rollout.vllm.internals import VllmInternals
from aligner.rollout.vllm.packing import PrepackedModule, forget_embedding_kernel, packed_linears
from aligner.rollout.written_regions import WrittenRegions


class EngineWeights:
    """The parameters of a `VllmEngine` as the destination of a weight sync (`aligner.reshard.weights.WritableWeights`).

    On a CPU vLLM packs linear weights and experts for its kernels and drops the plain ones. So a packed weight's plain
    storage is made when its first region is written; when all are, vLLM packs it again, the packed kernel is proven
    against the plain weight, and the plain one goes. At most the modules being written are in memory twice.

    On CUDA weights stay plain, those in FP8 with their scales too: regions are written in place, which keeps CUDA graphs valid, and nothing is
    packed or probed; there the executor's checksums read the very storage that the kernels read.

    Args:
        layout: of all ranks of the role, by arithmetic; None: an engine by itself, of which nobody asks that.
        tensors: name -> shape of the checkpoint's tensors; None: as the engine's model has them.
    """

    def __init__(
        self,
        engine: VllmInternals,
        layout: WeightLayout | None = None,
        tensors: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._engine, self._layout = engine, layout
        self._tensors = logical_tensors(engine.spec) if tensors is None else tensors
        self._quantized = quantized_tensors(engine.spec, engine.config)
        self._pieces: list[Piece] | None = None
        self._slots: dict[str, Slot] = {}
        self._packed: dict[str, tuple[PrepackedModule, ...]] = {}
        self._in_place: set[str] = set()
        self._derived: list[Module] = []
        """Attention layers that compute parameters of their own from those that are written."""
        self._sync = _Progress()
        self._syncs = 0
        self._enter: Callable[[], None] | None = None
        """Within `writing`: enters the engine, if that has not been done."""

    @property
    def layout(self) -> WeightLayout:
        """What every rank of the role holds."""
        assert self._layout is not None, "an engine outside a role has no layout"
        return self._layout

    def pieces(self) -> list[Piece]:
        """The regions of the checkpoint's tensors that this rank's engine holds, learnt once from vLLM's own loaders.

        The first call is collective over the replica.

        Raises:
            ValueError: the engine and the tensors do not match; see `dry_run`.
        """
        if self._pieces is None:
            model = self._engine.model
            outcome, mistake = DryRun(), ""
            with self._engine.inside():
                try:
                    outcome = dry_run(model, self._tensors, getattr(torch, self._engine.config.dtype), self._quantized)
                except ValueError as error:
                    mistake = str(error)
                self._check_replica(mistake, outcome.elsewhere)
                self._slots = outcome.slots
                self._packed = _packed(model, self._slots)
                forget_embedding_kernel(model)
                self._in_place = _in_place(self._slots, self._packed)
                self._derived = [module for module in model.modules() if _derived(module)]
                self.clear_padding()
            self._pieces = outcome.pieces
        return self._pieces

    def _check_replica(self, mistake: str, elsewhere: Sequence[str]) -> None:
        """ValueError on all ranks where one found a mistake or a tensor is left by each of them to the others."""
        reports = self._engine.gather((mistake, elsewhere))
        for reported, _ in reports:
            if reported:
                raise ValueError(mistake or reported)
        nowhere = sorted(set(elsewhere).intersection(*(names for _, names in reports)))
        if nowhere:
            raise ValueError(f"no rank of the rollout replica holds tensor {nowhere[0]} (of {len(nowhere)} such).")

    def agrees(self, layout: Sequence[Piece]) -> str | None:
        """None where `layout` is what this rank holds, piece for piece; else the first parameter that differs, and how."""
        assert self._pieces is not None, "pieces() comes first"
        own_pieces, layout_pieces = set(self._pieces), set(layout)
        for piece in (*self._pieces, *layout):
            if piece in own_pieces and piece in layout_pieces:
                continue
            place = (piece.storage, piece.name)
            held, described = (
                [str(p) for p in side if (p.storage, p.name) == place] for side in (self._pieces, layout)
            )
            return f"{piece.storage}: the engine holds {held or 'nothing'} of {piece.name}, the layout {described or 'nothing'}"
        return None

    def bytes(self) -> int:
        """Size of everything that a transfer writes; 0 before `pieces`."""
        return sum(slot.plain.nbytes for slot in self._slots.values())

    def in_place(self) -> list[Tensor]:
        """The parameters that a transfer writes where they are; before `pieces` every one."""
        if self._pieces is None:
            return list(self._engine.model.parameters())
        derived = [parameter for module in self._derived for parameter in _derived(module)]
        return [*(_live(self._slots[storage]) for storage in sorted(self._in_place)), *derived]

    def clear_padding(self) -> None:
        """vLLM's placeholder weights fill the rows that round the vocabulary up, too; its loaders would zero them."""
        for slot in (self._slots[storage] for storage in self._in_place):
            if slot.padding:
                _live(slot).detach().view(-1)[-slot.padding :].zero_()

    def view(self, piece: Piece) -> Tensor:
        """A writable view of the region in plain storage; from here until `finish` the engine has no valid weights."""
        plain = self._sync.plain.get(piece.storage)
        return strided_view(self._first_plain(piece) if plain is None else plain, piece)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The engine is entered once, for the first module that is complete."""
        with ExitStack() as stack:
            self._enter = cache(lambda: stack.enter_context(self._engine.packing()))
            try:
                yield
            finally:
                self._enter = None

    def written(self, pieces: Sequence[Piece], proof: bool = True) -> None:
        """Count the regions as written; the last one of a module makes the engine pack it, and `proof` proves that.

        Raises RuntimeError where a region comes twice or the engine's kernel does not hold what was written.
        """
        complete = [modules for piece in pieces if (modules := self._completed_by(piece))]
        if not complete:
            return
        with nullcontext() if self._enter else self.writing():
            assert self._enter is not None
            self._enter()
            for modules in complete:
                self._pack(modules, proof)

    def _pack(self, modules: Sequence[PrepackedModule], proof: bool) -> None:
        """The engine packs modules whose storages are written, and their plain weights go."""
        for packed in modules:
            plain = {storage: self._plain(storage) for storage in packed.storages}
            packed.pack(plain)
            if proof:
                packed.prove(plain, self._syncs)
        for storage in {storage for packed in modules for storage in packed.storages}:
            self._sync.plain.pop(storage, None)

    def _completed_by(self, piece: Piece) -> list[PrepackedModule]:
        """The modules whose last region is `piece`, which has been written."""
        storage, slot = piece.storage, self._slots[piece.storage]
        if self._sync.regions.add(piece) < slot.plain.numel() - slot.padding:
            return []
        self._sync.complete.add(storage)
        return [one for one in self._packed[storage] if self._sync.complete.issuperset(one.storages)]

    def finish(self) -> None:
        """Every region was written once: forget cached prefixes and let the engine generate.

        Raises RuntimeError naming the tensor otherwise.
        """
        sync, self._sync = self._sync, _Progress()
        self._syncs += 1
        sync.regions.check_complete(self._pieces or ())
        if self._derived:
            with self._engine.inside():
                for module in self._derived:
                    module.process_weights_after_loading(getattr(torch, self._engine.config.dtype))  # type: ignore[operator]
        self._engine.new_weights()
        self._engine.loaded.finish()

    def discard(self) -> None:
        """Give up a transfer that failed; the engine has no valid weights until the next one succeeds."""
        self._sync = _Progress()

    def _first_plain(self, piece: Piece) -> Tensor:
        """The plain storage of a region, where no region of it has been written or it is written in place."""
        if piece.storage in self._sync.complete:
            raise RuntimeError(f"reshard: {piece.name}{piece.box} for {piece.storage}, which is complete already")
        self._engine.loaded.begin()
        if piece.storage not in self._in_place:
            slot = self._slots[piece.storage]
            # Not zeroed, which would take longer than the copy: it is used when every element has been written.
            plain = torch.empty(slot.plain.shape, dtype=slot.plain.dtype, device=self._engine.device)
            plain.view(-1)[plain.numel() - slot.padding :] = 0
            self._sync.plain[piece.storage] = plain
        return self._plain(piece.storage)

    def _plain(self, storage: str) -> Tensor:
        return _live(self._slots[storage]).detach() if storage in self._in_place else self._sync.plain[storage]


@dataclass
class _Progress:
    """What has been written in one transfer."""

    plain: dict[str, Tensor] = field(default_factory=dict)
    regions: WrittenRegions = field(default_factory=WrittenRegions)
    complete: set[str] = field(default_factory=set)


def _derived(module: Module) -> list[Tensor]:
    """The parameters that an attention layer computes from other modules'."""
    return [value for name, value in module._parameters.items() if value is not None and is_derived(module, name)]


def _packed(model: Module, slots: Mapping[str, Slot]) -> dict[str, tuple[PrepackedModule, ...]]:
    """What is packed from each storage; () where the engine's kernels read the plain one."""
    prepacked: dict[str, tuple[PrepackedModule, ...]] = {}
    for storage, slot in slots.items():
        experts = packed_experts(storage.rpartition(":")[0], slot.module)
        linears = packed_linears(model, storage, slot.module, slot.parameter)
        prepacked[storage] = (*experts, *linears)
    return prepacked


def _in_place(slots: Mapping[str, Slot], packed: Mapping[str, Sequence[PrepackedModule]]) -> set[str]:
    """The storages that the engine keeps plain: packed experts have the plain shape too, but not its order."""
    return {
        storage
        for storage, slot in slots.items()
        if _live(slot).shape == slot.plain.shape and all(one.storages == (storage,) for one in packed[storage])
    }


def _live(slot: Slot) -> Tensor:
    live = slot.module._parameters[slot.parameter]
    assert live is not None, slot.storage
    return live
