"""What a row costs a model: FLOPs of a forward pass by the row's length (pure arithmetic)."""

from __future__ import annotations

import math

from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import EMBEDDING, embedding_tensor, end_shapes, expert_shapes, layer_shapes, logical_tensors
from aligner.spmd.cost import Cost


def row_cost(spec: ModelSpec) -> Cost:
    """FLOPs of a forward pass over one row; a backward pass has twice as many of each kind.

    2 for each weight of a matrix that a token passes: of experts those that it is sent to, of the embedding none (it is
    looked up) unless it is the output layer too. Attention: 2 products (scores, values) of 2 FLOPs over the causal half of l^2
    pairs, for every query head's dimensions in every layer.
    """
    if spec.tensors is not None:
        return Cost(2 * _passed_weights(spec), 2 * spec.layers * spec.heads * spec.head_dim)
    passed = sum(spec.layer_types.count(name) * _weights(layer_shapes(spec, name)) for name in spec.types)
    if spec.experts:
        passed += len(spec.sparse_layers) * spec.experts_per_token * _weights(expert_shapes(spec))
    ends = end_shapes(spec)
    embedding = ends.pop(EMBEDDING)
    passed += _weights(ends) + (math.prod(embedding) if spec.tied and spec.head is Head.LANGUAGE else 0)
    return Cost(2 * passed, 2 * spec.layers * spec.heads * spec.head_dim)


def _passed_weights(spec: ModelSpec) -> int:
    """Weights of matrices of a model whose layers are not known: of experts all, though a token passes a few."""
    shapes = logical_tensors(spec)
    looked_up = not (spec.tied and spec.head is Head.LANGUAGE)
    return _weights(shapes) - (math.prod(shapes[embedding_tensor(spec)]) if looked_up else 0)


def _weights(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
