"""Which regions of which logical tensors the engines' ranks hold, by rank and by tensor (pure, no torch, no vLLM)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from aligner.models.cuts import Columns, Cut, CutParameters, GroupedQKV, Parameter, ParameterRegion, Rows, Vocabulary
from aligner.models.spec import ModelSpec
from aligner.models.tensors import (
    LAYER,
    embedding,
    expert_parameters,
    expert_prefix,
    family_of,
    final_norm,
    layer_name,
    layer_parameters,
    output_layer,
    split_expert,
)
from aligner.reshard.plan.layout import LazyHolders
from aligner.reshard.plan.region import Piece
from aligner.rollout.vllm.sizes import VOCABULARY_BLOCK
from aligner.spmd.mesh import Mesh

W13, W2 = "routed_experts:w13_weight", "routed_experts:w2_weight"
"""Where the engine keeps all experts of a rank: gate above up projection of each, and its down projection."""


class EngineLayout:
    """What every rank of a role on vLLM holds; for any mesh, whether or not such a world exists.

    Storages are named and laid out as vLLM's own loaders want them (`dry_run`): "module.path:parameter", without what a
    CPU's kernels add when they pack. `aligner.rollout.vllm.sizes.check_runs` says whether the engine can run the model so.

    Args:
        dtype: of the engine.
        expert_parallel: each tensor rank holds whole experts, in order and as evenly as possible, the first ones more;
            else a part of every expert.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: str, expert_parallel: bool = False) -> None:
        assert mesh.context == 1 and spec.layers % mesh.pipeline == 0, "see aligner.rollout.vllm.sizes.check_runs"
        self._spec, self._mesh, self._dtype = spec, mesh, dtype
        self._sparse, self._expert_parallel = frozenset(spec.sparse_layers), expert_parallel
        self._stage_layers = spec.layers // mesh.pipeline
        first, last, every = {0}, {mesh.last_stage}, set(range(mesh.pipeline))
        above = (final_norm(spec),) if spec.tied else (final_norm(spec), output_layer(spec))
        if family_of(spec).engine.ends_everywhere:
            ends = [((embedding(spec), *above), every)]
        else:
            ends = [((embedding(spec),), first | last if spec.tied else first), (above, last)]
        self._ends = [(self._cut(engine_parameters(spec, parameters), stages), stages) for parameters, stages in ends]
        self._layers = [
            {name: self._cut(engine_parameters(spec, layer_parameters(spec, name)), {stage}) for name in spec.types}
            for stage in range(mesh.pipeline)
        ]
        if spec.experts:
            self._experts = [self._cut(_of_experts(spec), {stage}, expert_parallel) for stage in range(mesh.pipeline)]

    def _cut(self, parameters: Iterable[Parameter], stages: set[int], whole: bool = False) -> _Cut:
        """`whole`: every tensor rank holds all of it (of an expert that is its own)."""
        members = [
            tuple(sorted(rank for stage in stages for rank in self._of_tensor[stage][tensor]))
            for tensor in range(self._mesh.tensor)
        ]
        return _Cut(parameters, [tuple(sorted(rank for part in members for rank in part))] if whole else members)

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
                (self._piece(held, name, ""), ranks)
                for cut, _ in self._ends
                for held, ranks in cut.by_name.get(name, ())
            ]
        text, _, inside = name[len(LAYER) :].partition(".")
        number = int(text) if text.isdecimal() else -1
        if not 0 <= number < self._spec.layers:
            return []
        stage, kind, layer = number // self._stage_layers, self._spec.layer_types[number], layer_name(number, "")
        expert = split_expert(self._spec, inside) if number in self._sparse else None
        if expert is None:
            holders = self._layers[stage][kind].by_name.get(inside, [])
            return LazyHolders((stage, kind, inside), holders, lambda held: self._piece(held, name, layer))
        if expert[0] >= self._spec.experts:
            return []
        owner, slot = self._place(expert[0])
        holders = self._experts[stage].by_name.get(expert[1], [])
        if owner is not None:
            holders = [(held, self._of_tensor[stage][owner]) for held, _ in holders]
        return LazyHolders(
            ("experts", stage, owner, expert[1]), holders, lambda held: self._piece(held, name, layer, slot)
        )

    def _pieces(self, stage: int, tensor: int) -> Iterator[Piece]:
        for cut, stages in self._ends:
            for held in cut.of_part[tensor] if stage in stages else ():
                yield self._piece(held, held.region.name, "")
        experts = [
            (expert_prefix(self._spec, expert), slot)
            for expert in range(self._spec.experts)
            for owner, slot in (self._place(expert),)
            if owner in (None, tensor)
        ]
        for number in range(stage * self._stage_layers, (stage + 1) * self._stage_layers):
            layer = layer_name(number, "")
            for held in self._layers[stage][self._spec.layer_types[number]].of_part[tensor]:
                yield self._piece(held, layer + held.region.name, layer)
            part = 0 if self._expert_parallel else tensor
            for held in self._experts[stage].of_part[part] if number in self._sparse else ():
                for expert, slot in experts:
                    yield self._piece(held, layer + expert + held.region.name, layer, slot)

    def _piece(self, held: ParameterRegion, name: str, layer: str, slot: int = 0) -> Piece:
        _, lo, size, offset, stride = held.region
        return Piece(name, lo, size, layer + held.storage, offset + slot * held.elements, stride, self._dtype)

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


def engine_parameters(spec: ModelSpec, parameters: Iterable[Parameter]) -> list[Parameter]:
    """Megatron's parameters of a layer (or outside layers) as the engine has them: "module.path:parameter", and their cuts."""
    return [one for parameter in parameters for one in _as_engine(spec, parameter.cut)]


def _as_engine(spec: ModelSpec, cut: Cut) -> list[Parameter]:
    first = cut.blocks[0]
    kind = first.name.rpartition(".")[2]
    match cut:
        case GroupedQKV():  # beyond the key/value heads each rank has a copy of one
            heads = (spec.heads, spec.kv_heads, spec.kv_heads)
            return [Parameter(f"self_attn.qkv_proj:{kind}", Rows(cut.blocks, heads))]
        case Rows():
            return [Parameter(f"mlp.gate_up_proj:{kind}", cut)]
        case Vocabulary():
            return [Parameter(_own(first.name), Vocabulary(first, VOCABULARY_BLOCK))]
    return [Parameter(_own(first.name), cut)]


def _own(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{module}:{kind}"


def _of_experts(spec: ModelSpec) -> list[Parameter]:
    """An expert's parameters, with the storage of all experts of the rank, of which the first's begins at 0."""
    at = expert_prefix(spec, 0).removesuffix("0.")
    return [
        Parameter(at + (W2 if isinstance(parameter.cut, Columns) else W13), parameter.cut)
        for parameter in expert_parameters(spec)
    ]


class _Cut:
    """Some parameters cut into as many parts as there are `members`: each region once, with the ranks that hold it."""

    def __init__(self, parameters: Iterable[Parameter], members: Sequence[tuple[int, ...]]) -> None:
        cut = CutParameters(parameters, len(members))
        self.of_part = cut.of_part
        self.by_name = {
            name: [(held, tuple(sorted(rank for part in parts for rank in members[part]))) for held, parts in holders]
            for name, holders in cut.by_name.items()
        }
