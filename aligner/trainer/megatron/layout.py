"""Which regions of which checkpoint tensors Megatron's ranks hold, by rank and by tensor (pure arithmetic, no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from aligner.models.cuts import CutParameters, Parameter, ParameterRegion, Vocabulary
from aligner.models.spec import ModelSpec
from aligner.models.tensors import (
    LAYER,
    embedding,
    expert_parameters,
    expert_prefix,
    final_norm,
    layer_name,
    layer_parameters,
    output_layer,
    split_expert,
)
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import EXPERT_AXES, Mesh
from aligner.trainer.megatron.sizes import check_sizes, make_stages

STACKED = {"linear_fc1.weight": "weight1", "linear_fc2.weight": "weight2"}
"""Weights of an expert -> those of `GroupedExperts`."""


def padded_vocab_size(spec: ModelSpec, tensor: int) -> int:
    """Rows of the embedding, padded to a multiple of the tensor-parallel size."""
    cut = embedding(spec).cut
    assert isinstance(cut, Vocabulary)
    return cut.padded(tensor)


class MegatronLayout:
    """The weight layout of a role on Megatron: which regions every rank holds, for any mesh, without process groups.

    Storages are the GPTModel's parameter names, with layers numbered from the chunk's first and experts from the rank's
    first; with virtual_pipeline > 1 they begin with "chunk<number>.". Padding rows of the vocabulary belong to no piece.
    A tied model has a separate output layer only if its last chunk is not also the first; it is a copy of the embedding.

    Args:
        grouped: a rank's experts are stacked in one storage for each of their two weights (`GroupedExperts`).

    Raises:
        ValueError: the model cannot be split over this mesh.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str, grouped: bool = False) -> None:
        check_sizes(spec, mesh)
        self._grouped = grouped
        self.stages = make_stages(spec, mesh)
        self._spec, self._mesh, self._dtype = spec, mesh, dtype
        self._sparse = frozenset(spec.sparse_layers)
        self._layers = {name: CutParameters(layer_parameters(spec, name), mesh.tensor) for name in spec.types}
        self._ends = {
            end: CutParameters(self._end_parameters(*end), mesh.tensor)
            for end in ((0, 0), (mesh.last_stage, mesh.virtual_pipeline - 1))
        }
        if spec.experts:
            self._expert = CutParameters(expert_parameters(spec), mesh.expert_tensor)
        self._stage_and_storage = {
            number: (stage, self._layer_storage(chunk, local))
            for stage in range(mesh.pipeline)
            for chunk, layers in enumerate(self.stages.chunks(stage))
            for local, number in enumerate(layers)
        }
        self._members: dict[tuple[int, tuple[int, ...], int | None], tuple[int, ...]] = {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the role, ascending."""
        return self._mesh.ranks

    def layout(self, rank: int) -> Sequence[Piece]:
        """All pieces that one rank holds; none if the rank is not one of the role's."""
        return list(self._pieces(rank)) if self._mesh.shard_of(rank) is not None else []

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """The distinct pieces of a checkpoint tensor, each with the ranks that hold it, ascending."""
        if not name.startswith(LAYER):
            return [
                (self._piece(held, "", self._chunk(chunk)), self._ranks_of(stage, tensors))
                for (stage, chunk), cut in self._ends.items()
                for held, tensors in cut.by_name.get(name, ())
            ]
        layer, _, suffix = name[len(LAYER) :].partition(".")
        number = int(layer) if layer.isdecimal() else -1
        if number not in self._stage_and_storage:
            return []
        stage, storage = self._stage_and_storage[number]
        expert = split_expert(self._spec, suffix) if number in self._sparse else None
        if expert is None:
            cut, shard, prefix = self._layers[self._spec.layer_types[number]], None, layer_name(number, "")
        elif expert[0] < self._spec.experts:
            cut, (shard, slot) = self._expert, divmod(expert[0], self._experts_per_rank)
            place = self._expert_place(number, expert[0], slot, storage)
            return [
                (self._expert_piece(held, *place), self._ranks_of(stage, tensors, shard))
                for held, tensors in cut.by_name.get(expert[1], ())
            ]
        else:
            return []
        return [
            (self._piece(held, prefix, storage), self._ranks_of(stage, tensors, shard))
            for held, tensors in cut.by_name.get(suffix, ())
        ]

    def _pieces(self, rank: int) -> Iterator[Piece]:
        dense_coordinates = self._mesh.coordinates(rank)
        stage, tensor = dense_coordinates["pipeline"], dense_coordinates["tensor"]
        expert_coordinates = self._mesh.coordinates(rank, EXPERT_AXES)
        for chunk, layers in enumerate(self.stages.chunks(stage)):
            end = self._ends.get((stage, chunk))
            for held in end.of_part[tensor] if end else ():
                yield self._piece(held, "", self._chunk(chunk))
            for number in layers:
                storage = self._stage_and_storage[number][1]
                for held in self._layers[self._spec.layer_types[number]].of_part[tensor]:
                    yield self._piece(held, layer_name(number, ""), storage)
                for slot in range(self._experts_per_rank if number in self._sparse else 0):
                    expert = expert_coordinates["expert"] * self._experts_per_rank + slot
                    place = self._expert_place(number, expert, slot, storage)
                    for held in self._expert.of_part[expert_coordinates["expert_tensor"]]:
                        yield self._expert_piece(held, *place)

    @property
    def _experts_per_rank(self) -> int:
        return self._spec.experts // self._mesh.expert

    def _expert_place(self, number: int, expert: int, slot: int, storage: str) -> tuple[str, str, int]:
        """Prefixes of the names of an expert's tensors and of its storages, and its place in those that experts share."""
        prefix, storages = layer_name(number, expert_prefix(self._spec, expert)), f"{storage}mlp.experts."
        return (prefix, storages, slot) if self._grouped else (prefix, f"{storages}local_experts.{slot}.", 0)

    def _expert_piece(self, held: ParameterRegion, name_prefix: str, storage_prefix: str, slot: int) -> Piece:
        piece = self._piece(held, name_prefix, storage_prefix)
        if not self._grouped:
            return piece
        offset = piece.offset + slot * self._expert_elements[held.storage]
        return replace(piece, storage=storage_prefix + STACKED[held.storage], offset=offset)

    @cached_property
    def _expert_elements(self) -> dict[str, int]:
        """Elements of each of an expert's weights on a rank."""
        elements: dict[str, int] = {}
        for held in self._expert.of_part[0]:
            elements[held.storage] = elements.get(held.storage, 0) + math.prod(held.region[2])
        return elements

    def _chunk(self, chunk: int) -> str:
        return f"chunk{chunk}." if self._mesh.virtual_pipeline > 1 else ""

    def _layer_storage(self, chunk: int, local: int) -> str:
        return f"{self._chunk(chunk)}decoder.layers.{local}."

    def _end_parameters(self, stage: int, chunk: int) -> list[Parameter]:
        """Parameters outside the layers, for the first and the last chunk of the model."""
        first, last = self.stages.is_first(stage, chunk), self.stages.is_last(stage, chunk)
        output = [] if self._spec.tied and first else [output_layer(self._spec)]
        return [*([embedding(self._spec)] if first else ()), *([final_norm(self._spec), *output] if last else ())]

    def _piece(self, held: ParameterRegion, name_prefix: str, storage_prefix: str) -> Piece:
        name, lo, size, offset, stride = held.region
        return Piece(name_prefix + name, lo, size, storage_prefix + held.storage, offset, stride, self._dtype)

    def _ranks_of(self, stage: int, tensors: tuple[int, ...], expert: int | None = None) -> tuple[int, ...]:
        """The ranks of a stage with these tensor coordinates; for an expert shard, with these expert-tensor coordinates."""
        key = (stage, tensors, expert)
        if key not in self._members:
            ranks_at = self._ranks_at[stage]
            self._members[key] = tuple(
                sorted(rank for tensor in tensors for rank in ranks_at.get((expert, tensor), ()))
            )
        return self._members[key]

    @cached_property
    def _ranks_at(self) -> list[dict[tuple[int | None, int], list[int]]]:
        """Per stage: (None, tensor) and (expert, expert tensor) -> the ranks with these coordinates."""
        stages: list[dict[tuple[int | None, int], list[int]]] = [{} for _ in range(self._mesh.pipeline)]
        for rank in self._mesh.ranks:
            dense, of_experts = self._mesh.coordinates(rank), self._mesh.coordinates(rank, EXPERT_AXES)
            ranks_at = stages[dense["pipeline"]]
            ranks_at.setdefault((None, dense["tensor"]), []).append(rank)
            ranks_at.setdefault((of_experts["expert"], of_experts["expert_tensor"]), []).append(rank)
        return stages


@dataclass(frozen=True)
class MegatronSharding:
    """A checkpoint as one file for each rank of a Megatron layout without data parallelism, for tools/convert.py
    (an `aligner.models.stored.Sharding`). Parallel sizes as in placement.policy."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def sizes(self) -> Mapping[str, int]:
        """Parallel sizes by name."""
        return asdict(self)

    def layout(self, spec: ModelSpec, dtype: str) -> MegatronLayout:
        """The pieces in each of the folder's files. Raises ValueError if the model cannot be split so."""
        ranks = self.pipeline * max(self.tensor, self.expert * self.expert_tensor)
        return MegatronLayout(spec, Mesh(tuple(range(ranks)), **asdict(self), name="layout"), dtype)
