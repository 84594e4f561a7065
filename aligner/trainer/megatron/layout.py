"""Which regions of which logical tensors Megatron's ranks hold, by rank and by tensor (pure arithmetic, no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def padded_vocab_size(spec: ModelSpec, tensor: int) -> int:
    """Fewest rows of the embedding that the tensor ranks share equally."""
    cut = embedding(spec).cut
    assert isinstance(cut, Vocabulary)
    return cut.padded(tensor)


class MegatronLayout:
    """What every rank of a role on Megatron holds; for any mesh, whether or not such a world exists.

    Storages are the GPTModel's own parameter names, with layers counted from the chunk's first and experts from the
    rank's first; with virtual_pipeline > 1 they begin with "chunk<number>.". Rows that pad the vocabulary belong to no
    piece. A tied model has an output layer of its own only in a last chunk that is not also the first; it then holds
    the embedding's rows again.

    Raises:
        ValueError: the model cannot be cut over this mesh.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str) -> None:
        check_sizes(spec, mesh)
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
        self._place = {
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
        """Everything one rank holds; nothing where it is not of the role."""
        return list(self._pieces(rank)) if self._mesh.shard_of(rank) is not None else []

    def holders(self, name: str) -> Sequence[tuple[Piece, tuple[int, ...]]]:
        """Every distinct piece of one logical tensor with the ranks that hold it in that very form, ascending."""
        if not name.startswith(LAYER):
            return [
                (self._piece(held, "", self._chunk(chunk)), self._ranks_of(stage, tensors))
                for (stage, chunk), cut in self._ends.items()
                for held, tensors in cut.by_name.get(name, ())
            ]
        text, _, inside = name[len(LAYER) :].partition(".")
        number = int(text) if text.isdecimal() else -1
        if number not in self._place:
            return []
        stage, storage = self._place[number]
        expert = split_expert(self._spec, inside) if number in self._sparse else None
        if expert is None:
            cut, part, names = self._layers[self._spec.layer_types[number]], None, layer_name(number, "")
        elif expert[0] < self._spec.experts:
            cut, (part, slot) = self._expert, divmod(expert[0], self._held_experts)
            names, storage = self._of_expert(number, expert[0], slot, storage)
            inside = expert[1]
        else:
            return []
        return [
            (self._piece(held, names, storage), self._ranks_of(stage, tensors, part))
            for held, tensors in cut.by_name.get(inside, ())
        ]

    def _pieces(self, rank: int) -> Iterator[Piece]:
        at = self._mesh.coordinates(rank)
        stage, tensor = at["pipeline"], at["tensor"]
        experts = self._mesh.coordinates(rank, EXPERT_AXES)
        for chunk, layers in enumerate(self.stages.chunks(stage)):
            end = self._ends.get((stage, chunk))
            for held in end.of_part[tensor] if end else ():
                yield self._piece(held, "", self._chunk(chunk))
            for number in layers:
                storage = self._place[number][1]
                for held in self._layers[self._spec.layer_types[number]].of_part[tensor]:
                    yield self._piece(held, layer_name(number, ""), storage)
                for slot in range(self._held_experts if number in self._sparse else 0):
                    expert = experts["expert"] * self._held_experts + slot
                    at_expert = self._of_expert(number, expert, slot, storage)
                    for held in self._expert.of_part[experts["expert_tensor"]]:
                        yield self._piece(held, *at_expert)

    @property
    def _held_experts(self) -> int:
        return self._spec.experts // self._mesh.expert

    def _of_expert(self, number: int, expert: int, slot: int, storage: str) -> tuple[str, str]:
        """What the names of an expert's tensors and storages begin with."""
        return layer_name(number, expert_prefix(self._spec, expert)), f"{storage}mlp.experts.local_experts.{slot}."

    def _chunk(self, chunk: int) -> str:
        return f"chunk{chunk}." if self._mesh.virtual_pipeline > 1 else ""

    def _layer_storage(self, chunk: int, local: int) -> str:
        return f"{self._chunk(chunk)}decoder.layers.{local}."

    def _end_parameters(self, stage: int, chunk: int) -> list[Parameter]:
        """Parameters outside the layers, of the chunks that have them."""
        first, last = self.stages.is_first(stage, chunk), self.stages.is_last(stage, chunk)
        own_output = [] if self._spec.tied and first else [output_layer(self._spec)]
        return [*([embedding(self._spec)] if first else ()), *([final_norm(self._spec), *own_output] if last else ())]

    def _piece(self, held: ParameterRegion, names: str, storages: str) -> Piece:
        name, lo, size, offset, stride = held.region
        return Piece(names + name, lo, size, storages + held.storage, offset, stride, self._dtype)

    def _ranks_of(self, stage: int, tensors: tuple[int, ...], expert: int | None = None) -> tuple[int, ...]:
        """The ranks of a stage with these tensor coordinates, or with these expert-tensor ones of an expert shard."""
        key = (stage, tensors, expert)
        if key not in self._members:
            at = self._ranks_at[stage]
            self._members[key] = tuple(sorted(rank for tensor in tensors for rank in at.get((expert, tensor), ())))
        return self._members[key]

    @cached_property
    def _ranks_at(self) -> list[dict[tuple[int | None, int], list[int]]]:
        """Per stage: (None, tensor) and (expert, expert tensor) -> the ranks with these coordinates."""
        stages: list[dict[tuple[int | None, int], list[int]]] = [{} for _ in range(self._mesh.pipeline)]
        for rank in self._mesh.ranks:
            dense, of_experts = self._mesh.coordinates(rank), self._mesh.coordinates(rank, EXPERT_AXES)
            found = stages[dense["pipeline"]]
            found.setdefault((None, dense["tensor"]), []).append(rank)
            found.setdefault((of_experts["expert"], of_experts["expert_tensor"]), []).append(rank)
        return stages
