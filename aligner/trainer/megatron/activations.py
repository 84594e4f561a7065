"""Memory that a microbatch's computation takes on a rank, by arithmetic (no torch): layers, head, and what a pipeline has begun.

Not counted: what kernels take for themselves, buffers of collectives, tensors with one number for each token (positions,
log-probabilities, masks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.models.rope import Rope
from aligner.models.spec import Head, LayerType, ModelSpec
from aligner.models.tensors import family_of
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.spmd.mesh import Mesh
from aligner.trainer.activations import Activations, Microbatch
from aligner.trainer.megatron.layer_memory import Gradients, Layer, layer_most
from aligner.trainer.megatron.sizes import make_stages
from aligner.trainer.output_blocks import output_layer_bytes

if TYPE_CHECKING:
    from aligner.trainer.config import TrainingConfig

FLOAT32 = 4
BLOCK = 256
"""Queries of an attention call with a mask tensor (`attention_mask.BLOCK`)."""
MAX_KEPT = 0.95
"""Fraction of the tokens from which on the last layer computes all (`packing.MAX_KEPT`)."""
CACHED = 1 << 18
"""Elements that a CPU's elementwise functions work on at a time (`fused.CACHED`)."""
ROUTING = 4 + 4 + 4 + 1 + 1
"""Bytes that a token and an expert take in the router: logits, probabilities and their transpose in float32, the map and its."""


def make_layer(
    spec: ModelSpec,
    layer_type: LayerType,
    mesh: Mesh,
    config: TrainingConfig,
    sequence_parallel: bool,
    batch: Microbatch,
    cpu: bool,
    last: bool,
) -> Layer:
    """The sizes of a layer's tensors on one rank; ranks are taken to get equal numbers of tokens for their experts."""
    element, tensor = ELEMENT_BYTES[config.dtype], mesh.tensor
    tokens = batch.on_rank(mesh, sequence_parallel)
    local = tokens / tensor if sequence_parallel else tokens
    queries, keys = spec.heads // tensor * spec.head_dim, max(1, spec.kv_heads // tensor) * spec.head_dim
    residual, floats = local * spec.hidden * element, FLOAT32 * local
    copied = spec.norm_plus_one and element < FLOAT32
    sparse = layer_type.sparse
    expert_tensor = mesh.expert_tensor if sparse else 1
    sent = local * spec.experts_per_token * expert_tensor if sparse else 0.0
    ffn = spec.expert_ffn // expert_tensor if sparse else spec.ffn // tensor
    weight, window = spec.hidden * element, layer_type.window
    windowed = window is not None and window < batch.longest
    blocks = windowed or mesh.context > 1
    return Layer(
        residual=residual,
        whole=tokens * spec.hidden * element,
        # a float32 copy in the place of the input
        norm=floats * (1 + copied * spec.hidden) - copied * residual,
        norms=family_of(spec).norms,
        queries=tokens * queries * element,
        keys=tokens * keys * element,
        logsumexp=FLOAT32 * tokens * (spec.heads // tensor),
        qk_norm=spec.qk_norm,
        regroups=queries > keys > spec.head_dim,
        qkv_bias=spec.qkv_bias,
        mlp_bias=spec.mlp_bias and not sparse,
        projection_norm=FLOAT32 * tokens * (queries + keys) * (1 + (element < FLOAT32)),
        copies=not batch.alike and batch.longest < batch.tokens and mesh.context == 1,
        blocks=blocks,
        mask=BLOCK * min(batch.longest, (window or batch.longest) + BLOCK) * element * (blocks and (cpu or windowed)),
        gathered=2 * tokens * keys * element * mesh.context * (mesh.context > 1),
        recompute=config.recompute,
        both=(sent if sparse else tokens) * 2 * ffn * element,
        dispatched=sent * spec.hidden * element,
        routing=local * spec.experts * ROUTING if sparse else 0.0,
        # grouped ones are computed together
        experts=min(spec.experts // mesh.expert, spec.experts_per_token)
        if sparse and config.experts != "grouped"
        else 1,
        gradients=Gradients(
            qkv=weight * (queries + 2 * keys), proj=weight * queries, fc1=weight * 2 * ffn, fc2=weight * ffn
        ),
        part=FLOAT32 * CACHED if cpu else math.inf,
        kept=batch.predicting if last and not sequence_parallel and batch.predicting <= MAX_KEPT else 1.0,
    )


def activation_bytes(
    spec: ModelSpec,
    mesh: Mesh,
    config: TrainingConfig,
    sequence_parallel: bool,
    batch: Microbatch,
    forward_batch: Microbatch,
    microbatches: int,
    device: str,
) -> Activations:
    """Of the rank with the most.

    Args:
        batch: an update's microbatch.
        forward_batch: one without gradients.
        microbatches: of an update on each data shard; a pipeline begins several before it ends the first.
        device: cpu or cuda.
    """
    stages = [_Stage(spec, mesh, config, sequence_parallel, stage, device) for stage in range(mesh.pipeline)]
    return Activations(
        max(stage.update(batch, microbatches) for stage in stages),
        max(stage.inference(forward_batch) for stage in stages),
    )


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage of a model under a mesh."""

    spec: ModelSpec
    mesh: Mesh
    config: TrainingConfig
    sequence_parallel: bool
    number: int
    device: str

    def layers(self, batch: Microbatch) -> list[Layer]:
        """Of all its chunks."""
        spec, arguments = self.spec, (self.mesh, self.config, self.sequence_parallel, batch, self.device == "cpu")
        numbers = [one for chunk in make_stages(spec, self.mesh).chunks(self.number) for one in chunk]
        return [
            make_layer(spec, spec.types[spec.layer_types[one]], *arguments, last=one == spec.layers - 1)
            for one in numbers
        ]

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.mesh.pipeline - 1

    def begun(self, microbatches: int) -> float:
        """Microbatches whose activations are there at the same time: as many as the stages that follow have yet to return, of
        a virtual pipeline in chunks, which are parts of a microbatch."""
        stages, chunks = self.mesh.pipeline, self.mesh.virtual_pipeline
        behind = stages - self.number - 1
        if chunks == 1:
            return min(behind + 1, microbatches)
        return min(2 * behind + (chunks - 1) * stages + 1, microbatches * chunks) / chunks

    def inputs(self, batch: Microbatch, layer: Layer) -> float:
        """What the layers of a microbatch share: rotary tables, and the first one's input."""
        tokens = batch.on_rank(self.mesh, self.sequence_parallel)
        distinct: list[Rope] = []
        for rope in self.spec.rope.values():
            distinct += [rope] * (rope not in distinct)
        turned = sum(rope.rotary_dim(self.spec.head_dim) for rope in distinct)
        tables = 2 * tokens * turned * ELEMENT_BYTES[self.config.dtype]
        return tables + layer.residual

    def once(self, layers: Sequence[Layer]) -> float:
        """What is there once, whatever the layers and microbatches: masks, and what sequence parallelism gathers into."""
        return sum({layer.mask for layer in layers}) + layers[0].whole * self.sequence_parallel

    def output(self, batch: Microbatch, layer: Layer, grad: bool) -> float:
        """The head: the last hidden states, those that predict, and blocks of logits with their gradients."""
        if not self.last:
            return layer.residual  # what goes to the next stage
        if self.spec.head is Head.SCALAR:
            return layer.rest.residual + layer.rest.whole * FLOAT32 / ELEMENT_BYTES[self.config.dtype] * (1 + grad)
        tokens = math.ceil(batch.predicting * batch.on_rank(self.mesh, self.sequence_parallel))
        columns = -(-self.spec.vocab // self.mesh.tensor)
        width = ELEMENT_BYTES[self.config.dtype]
        return layer.rest.whole + output_layer_bytes(tokens, columns, self.spec.hidden, width, self.device, grad)

    def update(self, batch: Microbatch, microbatches: int) -> float:
        """Bytes of a microbatch's forward and backward, with what earlier ones have left."""
        layers = self.layers(batch)
        most = [layer_most(layer) for layer in layers]
        shared, once = self.inputs(batch, layers[0]), self.once(layers)
        kept = sum(one.kept for one in most)
        peak = kept + self.output(batch, layers[-1], grad=True)
        before = 0.0
        for one in most:
            peak = max(peak, before + one.forward, before + one.backward)
            before += one.kept
        if (
            self.first
        ):  # the embedding's gradient, which autograd makes whole; clipping makes a float32 one of its size again
            columns = -(-self.spec.vocab // self.mesh.tensor)
            peak = max(peak, layers[0].whole + columns * self.spec.hidden * FLOAT32)
        return once + peak + shared + (self.begun(microbatches) - 1) * (kept + shared)

    def inference(self, batch: Microbatch) -> float:
        """Bytes of a microbatch's forward."""
        layers = self.layers(batch)
        peak = max(layer_most(layer).inference for layer in layers)
        shared = self.once(layers) + self.inputs(batch, layers[0])
        if self.mesh.pipeline > 1:  # what the stage before sends for the next microbatch, and what this one has sent
            shared += 2 * layers[0].residual
        # beside the input of each layer that of the first
        return shared + max(peak + layers[0].residual, self.output(batch, layers[-1], grad=False))
