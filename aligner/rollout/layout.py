"""Which regions of which logical tensors the engines' ranks hold, by rank and by tensor (pure, no torch, no vLLM)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from aligner.models.family import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    Kind,
    Parameter,
    dense_shapes,
    end_shapes,
    expert_parameters,
    expert_prefix,
    expert_shapes,
    layer_name,
    layer_parameters,
    output_layer,
    split_expert,
)
from aligner.models.spec import ModelSpec
from aligner.reshard.plan.layout import LazyHolders
from aligner.reshard.plan.region import Piece
from aligner.rollout.config import padded_vocab
from aligner.spmd.mesh import Mesh

EXPERT_STORAGE = {Kind.GATE_UP: "routed_experts:w13_weight", Kind.COLUMNS: "routed_experts:w2_weight"}
ENDS_EVERYWHERE = ("qwen3_moe", "mixtral", "gemma")
"""Families whose embedding, last norm and output layer vLLM makes in every pipeline stage, used or not."""
FUSED = {Kind.QKV: "self_attn.qkv_proj", Kind.GATE_UP: "mlp.gate_up_proj"}


class EngineLayout:
    """What every rank of a role on vLLM holds; for any mesh, whether or not such a world exists.

    Storages are named and laid out as vLLM's own loaders want them (`dry_run`): "module.path:parameter", without what a
    CPU's kernels add when they pack. `RolloutConfig.check_model` says whether the engine can run the model so.

    Args:
        dtype: of the engine.
        expert_parallel: each tensor rank holds whole experts, in order and as evenly as possible, the first ones more;
            else a part of every expert.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str, expert_parallel: bool = False) -> None:
        assert mesh.context == 1 and spec.layers % mesh.pipeline == 0, "see RolloutConfig.check_model"
        self._spec, self._mesh, self._dtype = spec, mesh, dtype
        self._sparse, self._expert_parallel = frozenset(spec.sparse_layers), expert_parallel
        self._stage_layers = spec.layers // mesh.pipeline
        first, last, every = {0}, {mesh.last_stage}, set(range(mesh.pipeline))
        above = (FINAL_NORM,) if spec.tied else (FINAL_NORM, output_layer(spec))
        if spec.family in ENDS_EVERYWHERE:
            ends = [((EMBEDDING, *above), every)]
        else:
            ends = [((EMBEDDING,), first | last if spec.tied else first), (above, last)]
        self._ends = [(self._cut(parameters, end_shapes(spec), stages), stages) for parameters, stages in ends]
        self._layers = [
            {
                sparse: self._cut(layer_parameters(spec, sparse), dense_shapes(spec, sparse), {stage})
                for sparse in ((False, True) if spec.experts else (False,))
            }
            for stage in range(mesh.pipeline)
        ]
        if spec.experts:
            self._experts = [
                self._cut(expert_parameters(spec), expert_shapes(spec), {stage}, True) for stage in range(mesh.pipeline)
            ]

    def _cut(
        self,
        parameters: Iterable[Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        stages: set[int],
        in_expert: bool = False,
    ) -> _Cut:
        members = [
            tuple(sorted(rank for stage in stages for rank in self._of_tensor[stage][tensor]))
            for tensor in range(self._mesh.tensor)
        ]
        if in_expert and self._expert_parallel:
            members = [tuple(sorted(rank for part in members for rank in part))]
        return _Cut(self._spec, parameters, shapes, members, in_expert)

    @cached_property
    def _of_tensor(self) -> list[list[tuple[int, ...]]]:
        """For each stage and tensor rank, the world ranks that are it in their replicas."""
        replicas = self._mesh.groups("data")
        return [
            [group for group in replicas if group[0] in stage]
            for stage in map(frozenset, self._mesh.groups("tensor", "data"))
        ]

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the role, ascending."""
        return self._mesh.ranks

    def layout(self, rank: int) -> Sequence[Piece]:
        """Everything one rank holds; nothing where it is not of the role."""
        if rank not in self._mesh.ranks:
            return []
        at = self._mesh.coordinates(rank)
        return list(self._pieces(at["pipeline"], at["tensor"]))

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """Every distinct piece of one logical tensor with the ranks that hold it in that very form, ascending."""
        if not name.startswith(LAYER):
            return [
                (self._piece(region, name, ""), ranks)
                for cut, _ in self._ends
                for region, ranks in cut.by_name.get(name, ())
            ]
        text, _, inside = name[len(LAYER) :].partition(".")
        number = int(text) if text.isdecimal() else -1
        if not 0 <= number < self._spec.layers:
            return []
        stage, sparse, layer = number // self._stage_layers, number in self._sparse, layer_name(number, "")
        expert = split_expert(self._spec, inside) if sparse else None
        if expert is None:
            found = self._layers[stage][sparse].by_name.get(inside, [])
            return LazyHolders((stage, sparse, inside), found, lambda region: self._piece(region, name, layer))
        if expert[0] >= self._spec.experts:
            return []
        owner, slot = self._place(expert[0])
        found = self._experts[stage].by_name.get(expert[1], [])
        if owner is not None:
            found = [(region, self._of_tensor[stage][owner]) for region, _ in found]
        return LazyHolders(
            ("experts", stage, owner, expert[1]), found, lambda region: self._piece(region, name, layer, slot)
        )

    def _pieces(self, stage: int, tensor: int) -> Iterator[Piece]:
        for cut, stages in self._ends:
            for region in cut.of_part[tensor] if stage in stages else ():
                yield self._piece(region, region.name, "")
        held = [
            (expert_prefix(self._spec, expert), slot)
            for expert in range(self._spec.experts)
            for owner, slot in (self._place(expert),)
            if owner in (None, tensor)
        ]
        for number in range(stage * self._stage_layers, (stage + 1) * self._stage_layers):
            sparse, layer = number in self._sparse, layer_name(number, "")
            for region in self._layers[stage][sparse].of_part[tensor]:
                yield self._piece(region, layer + region.name, layer)
            for region in self._experts[stage].of_part[0 if self._expert_parallel else tensor] if sparse else ():
                for expert, slot in held:
                    yield self._piece(region, layer + expert + region.name, layer, slot)

    def _piece(self, region: _Region, name: str, layer: str, slot: int = 0) -> Piece:
        _, lo, size, storage, offset, stride, per_slot = region
        return Piece(name, lo, size, layer + storage, offset + slot * per_slot, stride, self._dtype)

    def _place(self, expert: int) -> tuple[int | None, int]:
        """The tensor rank that holds an expert (None: all hold a part), and its place among those of the rank."""
        if not self._expert_parallel:
            return None, expert
        least, more = divmod(self._spec.experts, self._mesh.tensor)
        if expert < more * (least + 1):
            owner, slot = divmod(expert, least + 1)
        else:
            owner, slot = divmod(expert - more * (least + 1), least)
            owner += more
        return owner, slot


class _Region(NamedTuple):
    """A piece without what depends on the layer and the expert: names of tensors are those inside it."""

    name: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    storage: str
    offset: int
    stride: tuple[int, ...]
    per_slot: int
    """Elements of the storage that each expert of a rank takes; 0 outside experts."""


class _Cut:
    """Some parameters cut into as many parts as there are `members`: each region once, with the ranks that hold it."""

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Iterable[Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        members: Sequence[tuple[int, ...]],
        in_expert: bool,
    ) -> None:
        self._spec, self._shapes, self._parts, self._in_expert = spec, shapes, len(members), in_expert
        self.by_name: dict[str, list[tuple[_Region, tuple[int, ...]]]] = {}
        self.of_part: list[list[_Region]] = [[] for _ in members]
        for parameter in parameters:
            for region, parts in self._regions(parameter):
                ranks = tuple(sorted(rank for part in parts for rank in members[part]))
                self.by_name.setdefault(region.name, []).append((region, ranks))
                for part in parts:
                    self.of_part[part].append(region)

    def _regions(self, parameter: Parameter) -> Iterator[tuple[_Region, range]]:
        """The rows (or columns) of each logical tensor in turn, on top of each other, with the parts that hold them."""
        row = 0
        total = sum(self._rows_per_rank(parameter, name) for name in parameter.logical)
        for name in parameter.logical:
            rows, *rest = self._shapes[name]
            held = self._rows_per_rank(parameter, name)
            width = rest[0] // self._parts if parameter.kind is Kind.COLUMNS else rest[0] if rest else 1
            copies = self._copies(parameter, name)
            storage, per_slot = self._storage(parameter), total * width if self._in_expert else 0
            for part in range(self._parts // copies):
                lo, size = (part * held, *(0 for _ in rest)), (min(held, rows - part * held), *rest)
                if parameter.kind is Kind.COLUMNS:
                    lo, size = (0, part * width), (rows, width)
                if size[0] > 0:  # a rank may lie beyond the end of a small vocabulary
                    stride = (width, 1) if rest else (1,)
                    region = _Region(name, lo, size, storage, row * width, stride, per_slot)
                    yield region, range(part * copies, (part + 1) * copies)
            row += held

    def _copies(self, parameter: Parameter, name: str) -> int:
        """How many neighbouring parts are the same: beyond the key-value heads each gets a copy of one."""
        if parameter.kind is Kind.REPLICATED:
            return self._parts
        if parameter.kind is Kind.QKV and name != parameter.logical[0]:
            return max(1, self._parts // self._spec.kv_heads)
        return 1

    def _rows_per_rank(self, parameter: Parameter, name: str) -> int:
        rows = self._shapes[name][0]
        match parameter.kind:
            case Kind.COLUMNS:
                return rows
            case Kind.VOCABULARY:
                return padded_vocab(rows) // self._parts
        return rows * self._copies(parameter, name) // self._parts

    def _storage(self, parameter: Parameter) -> str:
        if self._in_expert:
            return expert_prefix(self._spec, 0).removesuffix("0.") + EXPERT_STORAGE[parameter.kind]
        module, _, kind = parameter.logical[0].rpartition(".")
        return f"{FUSED.get(parameter.kind, module)}:{kind}"
