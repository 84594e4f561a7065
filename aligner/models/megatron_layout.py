"""Which regions of which logical tensors a Megatron rank's parameters hold (pure arithmetic, no torch, no Megatron)."""

from __future__ import annotations

from collections.abc import Iterator

from aligner.models.family import (
    EMBEDDING,
    FINAL_NORM,
    Kind,
    Parameter,
    layer_name,
    layer_parameters,
    logical_tensors,
    output_layer,
)
from aligner.models.spec import ModelSpec, check_sizes
from aligner.reshard.region import Piece, contiguous_stride


def padded_vocab_size(spec: ModelSpec, tensor: int) -> int:
    """Fewest rows of the embedding that the tensor ranks share equally."""
    return -(-spec.vocab // tensor) * tensor


def stage_layers(spec: ModelSpec, stage: int, pipeline: int, setting: str = "placement.policy") -> range:
    """The layers (counted over the whole model) of pipeline stage `stage`; ValueError where stages cannot be equal."""
    check_sizes(spec, 1, pipeline, setting)
    layers = spec.layers // pipeline
    return range(stage * layers, (stage + 1) * layers)


def megatron_layout(
    spec: ModelSpec,
    tensor_rank: int,
    tensor: int,
    first_layer: int,
    layers: int,
    first_stage: bool,
    last_stage: bool,
    dtype: str,
    padded_vocab: int | None = None,
    setting: str = "placement.policy",
) -> list[Piece]:
    """The layout of one rank's GPTModel: its stage's layers, and the ends of the model where the stage has them.

    Storages are the GPTModel's own parameter names, with layer indices counted from the stage's first layer. Rows that
    pad the vocabulary belong to no piece. A tied model has an output layer of its own only where the last stage
    is not also the first; it then holds the embedding's rows again.

    Args:
        tensor_rank: this rank's place among the `tensor` ranks that share every layer.
        first_layer: the stage's first layer, counted over the whole model.
        dtype: of the parameters.
        padded_vocab: rows of the embedding over all tensor ranks; by default the fewest that fit.
        setting: the role's placement, for errors.

    Raises:
        ValueError: `tensor` does not divide the heads, key/value heads or MLP width.
    """
    check_sizes(spec, tensor, 1, setting)
    assert 0 <= tensor_rank < tensor, f"tensor rank {tensor_rank} of {tensor}"
    assert first_layer >= 0 and first_layer + layers <= spec.layers, f"layers {first_layer}+{layers} of {spec.layers}"
    padded_vocab = padded_vocab or padded_vocab_size(spec, tensor)
    assert padded_vocab >= spec.vocab and padded_vocab % tensor == 0, f"padded_vocab={padded_vocab}"
    cut = _Cut(spec, tensor_rank, tensor, dtype, padded_vocab)
    pieces: list[Piece] = []
    if first_stage:
        pieces += cut.pieces(EMBEDDING)
    for local in range(layers):
        for parameter in layer_parameters(spec):
            logical = tuple(layer_name(first_layer + local, name) for name in parameter.logical)
            pieces += cut.pieces(Parameter(f"decoder.layers.{local}.{parameter.megatron}", parameter.kind, logical))
    if last_stage:
        pieces += cut.pieces(FINAL_NORM)
        if not (spec.tied and first_stage):
            pieces += cut.pieces(output_layer(spec))
    return pieces


class _Cut:
    """How one tensor rank's parameters are cut out of the logical tensors."""

    def __init__(self, spec: ModelSpec, tensor_rank: int, tensor: int, dtype: str, padded_vocab: int) -> None:
        self._spec, self._rank, self._tensor, self._dtype = spec, tensor_rank, tensor, dtype
        self._padded_vocab = padded_vocab
        self._shapes = logical_tensors(spec)

    def pieces(self, parameter: Parameter) -> Iterator[Piece]:
        first = parameter.logical[0]
        match parameter.kind:
            case Kind.REPLICATED:
                yield self._rows(parameter, first, 0, self._shapes[first][0], 0)
            case Kind.VOCABULARY:
                rows = self._padded_vocab // self._tensor
                start = min(self._rank * rows, self._spec.vocab)
                held = min(rows, self._spec.vocab - start)
                if held:
                    yield self._rows(parameter, first, start, held, 0)
            case Kind.GATE_UP:
                rows = self._spec.ffn // self._tensor
                for number, name in enumerate(parameter.logical):
                    yield self._rows(parameter, name, self._rank * rows, rows, number * rows)
            case Kind.COLUMNS:
                yield self._columns(parameter, first)
            case Kind.QKV:
                yield from self._qkv(parameter)

    def _qkv(self, parameter: Parameter) -> Iterator[Piece]:
        """Megatron interleaves: for every key/value head its queries, then its key, then its value."""
        head = self._spec.head_dim
        queries = self._spec.heads // self._spec.kv_heads * head
        groups = self._spec.kv_heads // self._tensor
        for local in range(groups):
            group, row = self._rank * groups + local, local * (queries + 2 * head)
            for name, rows in zip(parameter.logical, (queries, head, head), strict=True):
                yield self._rows(parameter, name, group * rows, rows, row)
                row += rows

    def _rows(self, parameter: Parameter, name: str, start: int, rows: int, local_row: int) -> Piece:
        """Rows [start, start + rows) of a logical tensor, from row `local_row` of the parameter on."""
        rest = self._shapes[name][1:]
        stride = contiguous_stride((rows, *rest))
        lo, size = (start, *(0 for _ in rest)), (rows, *rest)
        return Piece(name, lo, size, parameter.megatron, local_row * stride[0], stride, self._dtype)

    def _columns(self, parameter: Parameter, name: str) -> Piece:
        rows, columns = self._shapes[name]
        width = columns // self._tensor
        return Piece(name, (0, self._rank * width), (rows, width), parameter.megatron, 0, (width, 1), self._dtype)
