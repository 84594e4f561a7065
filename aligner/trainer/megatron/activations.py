"""Memory of one microbatch's computation on a rank, by arithmetic (no torch): what the layers save for the backward, and what is
there beside it while they compute.

It follows the computation tensor by tensor, as `layers`, `attention`, `fused` and `output_layer` and Megatron-core's modules make,
save and free them, and takes the maximum. Not counted: what a kernel takes for itself, buffers of collectives, tensors with one number
per token (positions, log-probabilities, masks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.models.family import Norms
from aligner.models.spec import Head, LayerType, ModelSpec, QKNorm
from aligner.models.tensors import family_of
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.spmd.mesh import Mesh
from aligner.trainer.activations import Activations, Microbatch
from aligner.trainer.megatron.sizes import make_stages
from aligner.trainer.output_blocks import output_layer_bytes

if TYPE_CHECKING:
    from aligner.trainer.config import TrainingConfig

FLOAT32 = 4
BLOCK = 256
"""Queries of an attention call with a mask tensor (`attention_mask.BLOCK`)."""
CACHED = 1 << 18
"""Elements that a CPU's elementwise functions work on at a time (`fused.CACHED`)."""
ROUTING = 4 + 4 + 4 + 1 + 1
"""Bytes that a token and an expert take in the router: logits, probabilities and their transpose in float32, the map and its."""


@dataclass(frozen=True)
class Gradients:
    """Bytes of the gradients of a layer's weights, as autograd makes them before they are added to the float32 ones."""

    qkv: float
    proj: float
    fc1: float
    """Gate and up projection, of an MLP or one expert."""
    fc2: float


class Tensors:
    """Bytes of tensors by name, as a computation makes and frees them, and the most that there were."""

    def __init__(self, **sizes: float) -> None:
        self._bytes: dict[str, float] = {}
        self.now = self.most = 0.0
        self.make(**sizes)

    def make(self, **sizes: float) -> None:
        """All at once."""
        for name, size in sizes.items():
            assert name not in self._bytes, f"{name} is there already"
            self._bytes[name] = size
            self.now += size
        self.most = max(self.most, self.now)

    def free(self, *names: str) -> None:
        """Those of them that are there."""
        self.now -= sum(self._bytes.pop(name, 0.0) for name in names)

    def during(self, **sizes: float) -> None:
        """Made and freed."""
        self.make(**sizes)
        self.free(*sizes)

    def only(self, *names: str) -> None:
        """Free all others."""
        self.free(*(self._bytes.keys() - set(names)))


@dataclass(frozen=True)
class Layer:
    """Bytes of the tensors of one layer for one microbatch on one rank."""

    residual: float
    """The stream between layers: this rank's tokens, under sequence parallelism its share of them."""
    whole: float
    """The same for all tokens that the tensor-parallel ranks share."""
    norm: float
    """What a norm saves beside its input: one scale for each token, and what float32 takes more where it computes on a copy."""
    norms: Norms
    """Where there is a norm."""
    queries: float
    keys: float
    """As large as the values."""
    logsumexp: float
    """Of attention's softmax."""
    qk_norm: QKNorm | None
    regroups: bool
    """Queries are copied out of the projection, in which each group lies beside its key and value."""
    qkv_bias: bool
    mlp_bias: bool
    projection_norm: float
    """What norms of whole projections save: float32 copies of queries and keys, scaled."""
    copies: bool
    """Attention works on padded copies of rows of different length."""
    blocks: bool
    """Attention goes by blocks of queries, whose results are joined."""
    mask: float
    """The mask of one block, where the kernel needs one."""
    gathered: float
    """Keys and values of all context-parallel ranks; 0 without context parallelism."""
    recompute: str
    both: float
    """Gate and up projection, of an MLP or of all experts on this rank."""
    dispatched: float
    """Tokens sent to this rank's experts; 0: a dense MLP."""
    routing: float
    """Logits, probabilities and map of the router."""
    experts: int
    """On this rank."""
    gradients: Gradients
    part: float
    """The largest temporary of an elementwise function, which a CPU takes in parts."""

    def temporary(self, size: float) -> float:
        """Of a function whose tensors have this size."""
        return min(size, self.part)

    @property
    def qkv(self) -> float:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys

    def forward(self, t: Tensors, grad: bool) -> None:
        """Beside the layer's input; what the backward needs and `output` are left, without `grad` the output alone."""
        self._attention(t, grad)
        self._mlp(t, grad)
        t.only(*(SAVED if grad else ()), "output")

    def _attention(self, t: Tensors, grad: bool) -> None:
        """`sum` is left, and what is saved."""
        if self.norms.before_attention:
            t.make(normed=self.residual, norm1=self.norm)
        t.make(qkv=self.qkv)
        if self.qkv_bias:
            t.during(biased=self.qkv)
        if self.regroups:
            t.make(grouped=self.queries)
        if self.qk_norm is QKNorm.HEAD:
            t.make(raw_queries=0.0 if self.regroups else self.queries, raw_keys=self.keys)
        elif self.qk_norm is QKNorm.PROJECTION:
            t.make(scaled=self.projection_norm)
        if self.qk_norm is not None:
            t.make(normed_qk=self.queries + self.keys)
        t.make(rotated=self.queries + self.keys)
        t.during(turned=self.temporary(self.queries))
        t.make(values=self.keys)
        t.free("normed_qk")
        if self.qk_norm is not QKNorm.PROJECTION or not grad:  # else they are saved as they come from the projection
            t.free("qkv")
        if self.qk_norm is None or not grad:
            t.free("grouped", "raw_queries", "raw_keys", "scaled")
        if self.gathered:
            t.make(gathered=self.gathered, rows=self.gathered, sent=2 * self.keys)
            t.free("gathered", "sent")
        if self.copies:
            t.make(copies=self.qkv)
        if self.copies or self.blocks:
            t.make(joined=self.queries)
        t.make(core=self.queries, logsumexp=self.logsumexp)
        t.free("rows")
        if not grad or self.recompute == "selective":
            t.free("copies", "joined", "logsumexp")
        t.make(projected=self.residual)
        if self.norms.after_attention:
            t.make(normed_projected=self.residual, norm2=self.norm)
        t.make(sum=self.residual)
        if not self.norms.after_attention:
            t.free("projected")
        t.free("normed_projected", *(["rotated"] if grad and self.copies and self.recompute != "selective" else []))
        if not grad:
            t.only("sum")

    def _mlp(self, t: Tensors, grad: bool) -> None:
        """`output` is left, and what is saved."""
        if self.norms.before_mlp:
            t.make(normed_sum=self.residual, norm3=self.norm)
        if self.dispatched:
            t.make(routing=self.routing, permuted=self.dispatched)
            t.make(dispatched=self.dispatched)  # sorted by expert
        t.make(both=self.both)
        if self.mlp_bias:
            t.during(biased=self.both)
        t.make(gated=self.both / 2)
        t.during(activated=self.temporary(self.both / 2 / self.experts))
        if self.dispatched:
            t.make(weighted=self.both / 2)  # by the router's probabilities
            t.make(expert_outputs=self.dispatched, joined_outputs=self.dispatched)
            t.free("expert_outputs", "permuted")
        t.make(mlp_output=self.residual)
        if self.norms.after_mlp:
            t.make(normed_output=self.residual, norm4=self.norm)
        t.make(output=self.residual)
        t.free("joined_outputs", "normed_output", *(() if self.norms.after_mlp else ("mlp_output",)))

    def backward(self, t: Tensors) -> None:
        """What `forward` has left, and `grad` of the output, are there; the gradient of the input is left."""
        self._mlp_backward(t)
        self._attention_backward(t)

    def _mlp_backward(self, t: Tensors) -> None:
        if self.norms.after_mlp:
            t.make(grad_mlp=self.residual)
            t.free("mlp_output", "norm4")
        if self.dispatched:
            self._experts_backward(t)
        else:
            t.make(grad_gated=self.both / 2, grad_fc2=self.gradients.fc2)
            t.free("grad_fc2", "gated", "grad_mlp")
            t.make(grad_both=self.both)
            t.during(inner=self.temporary(self.both / 2), activated=self.temporary(self.both / 2))
            t.free("both", "grad_gated")
            t.make(grad_normed=self.whole, grad_fc1=self.gradients.fc1)
            t.free("grad_fc1", "grad_both", "normed_sum")
        t.make(grad_sum=self.residual)
        t.free("grad_normed", "norm3", "grad")
        t.free("sum")

    def _experts_backward(self, t: Tensors) -> None:
        """One expert after the other, each of which frees what it has saved: the first finds the others' still there."""
        t.make(grad_joined=self.dispatched, grad_outputs=self.dispatched)
        t.free("grad_joined", "grad_mlp")
        both = self.both / self.experts
        t.make(grad_weighted=both / 2, grad_fc2=self.gradients.fc2)
        t.free("grad_fc2")
        t.make(grad_gated=both / 2)
        t.free("grad_weighted")
        t.make(grad_both=both)
        t.during(inner=self.temporary(both / 2), activated=self.temporary(both / 2))
        t.free("grad_gated")
        t.during(grad_dispatched=self.dispatched / self.experts, grad_fc1=self.gradients.fc1)
        t.free("grad_both", "both", "gated", "weighted", "grad_outputs")
        t.make(grads_of_each=self.dispatched, grad_dispatched=self.dispatched)
        t.free("grads_of_each", "dispatched")
        t.make(grad_permuted=self.dispatched)
        t.free("grad_dispatched")
        t.make(grad_normed=self.residual)
        t.free("grad_permuted", "routing", "normed_sum")

    def _attention_backward(self, t: Tensors) -> None:
        if self.norms.after_attention:
            t.make(grad_projected=self.residual)
            t.free("projected", "norm2")
        t.make(grad_core=self.queries, grad_proj=self.gradients.proj)
        t.free("grad_proj", "joined", "grad_projected")
        if self.recompute == "selective":
            t.make(again=self.queries + self.logsumexp + self.qkv * self.copies)
        if self.gathered:
            t.make(gathered=self.gathered, rows=self.gathered, sent=2 * self.keys)
            t.free("gathered", "sent")
            t.make(grad_rows=self.gathered)
        t.make(grad_rotated=self.queries + self.keys, grad_values=self.keys)
        t.free("rotated", "values", "core", "logsumexp", "again", "copies", "grad_core", "rows", "grad_rows")
        t.make(grad_normed_qk=self.queries + self.keys)
        t.free("grad_rotated")
        t.make(grad_qkv=self.qkv)
        t.free("grad_normed_qk", "grad_values", "grouped", "raw_queries", "raw_keys", "scaled", "qkv")
        t.make(grad_normed=self.whole, grad_qkv_weight=self.gradients.qkv)
        t.free("grad_qkv_weight", "grad_qkv", "normed")
        t.make(grad_input=self.residual)


SAVED = (
    "normed", "norm1", "qkv", "grouped", "raw_queries", "raw_keys", "scaled", "rotated", "values", "copies", "joined", "core", "logsumexp", "projected",
    "norm2", "sum", "normed_sum", "norm3", "routing", "dispatched", "both", "gated", "weighted", "mlp_output", "norm4",
)  # fmt: skip
"""Names of what the backward needs of a layer, as far as `forward` has left them."""


@dataclass(frozen=True)
class LayerMost:
    """What one layer takes beside its input, the gradient of its output counted in the backward."""

    forward: float
    """At most, in the update's forward."""
    kept: float
    """From the forward to the backward, the layer's output among it."""
    backward: float
    """At most, with what was kept."""
    inference: float
    """At most, without gradients."""


def layer_most(layer: Layer) -> LayerMost:
    """Go through a layer forward and backward."""
    inference, saving = Tensors(), Tensors()
    layer.forward(inference, grad=False)
    layer.forward(saving, grad=True)
    kept = saving.now
    if layer.recompute != "full":
        # the next layer's input, which it holds, is this one's output
        forward = saving.most
        saving.make(grad=layer.residual)
        saving.most = saving.now
        layer.backward(saving)
        return LayerMost(forward, kept, saving.most, inference.most)
    saving.make(grad=layer.residual)
    layer.backward(saving)
    # the output of the layer that is computed again stays until its backward is through
    return LayerMost(inference.most, layer.residual, saving.most + layer.residual, inference.most)


def make_layer(
    spec: ModelSpec,
    layer_type: LayerType,
    mesh: Mesh,
    config: TrainingConfig,
    sequence_parallel: bool,
    batch: Microbatch,
    cpu: bool,
) -> Layer:
    """The sizes of a layer's tensors on one rank; experts are taken to get equal numbers of tokens."""
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
        experts=spec.experts // mesh.expert if sparse else 1,
        gradients=Gradients(
            qkv=weight * (queries + 2 * keys), proj=weight * queries, fc1=weight * 2 * ffn, fc2=weight * ffn
        ),
        part=FLOAT32 * CACHED if cpu else math.inf,
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
        return [make_layer(spec, spec.types[spec.layer_types[one]], *arguments) for one in numbers]

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
        turned = {rope.rotary_dim(self.spec.head_dim) for rope in self.spec.rope.values()}
        tables = 2 * tokens * sum(turned) * ELEMENT_BYTES[self.config.dtype]
        return tables + layer.residual

    def once(self, layers: Sequence[Layer]) -> float:
        """What is there once, whatever the layers and microbatches: masks, and what sequence parallelism gathers into."""
        return sum({layer.mask for layer in layers}) + layers[0].whole * self.sequence_parallel

    def output(self, batch: Microbatch, layer: Layer, grad: bool) -> float:
        """The head: the last hidden states, those that predict, and blocks of logits with their gradients."""
        if not self.last:
            return layer.residual  # what goes to the next stage
        if self.spec.head is Head.SCALAR:
            return layer.residual + layer.whole * FLOAT32 / ELEMENT_BYTES[self.config.dtype] * (1 + grad)
        tokens = batch.on_rank(self.mesh, self.sequence_parallel)
        columns = -(-self.spec.vocab // self.mesh.tensor)
        width = ELEMENT_BYTES[self.config.dtype]
        return layer.whole + output_layer_bytes(tokens, columns, self.spec.hidden, width, self.device, grad)

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
        if self.first:
            columns = -(-self.spec.vocab // self.mesh.tensor)
            peak = max(peak, layers[0].whole + columns * self.spec.hidden * ELEMENT_BYTES[self.config.dtype])
        return once + peak + shared + (self.begun(microbatches) - 1) * (kept + shared)

    def inference(self, batch: Microbatch) -> float:
        """Bytes of a microbatch's forward."""
        layers = self.layers(batch)
        peak = max(layer_most(layer).inference for layer in layers)
        return self.once(layers) + self.inputs(batch, layers[0]) + max(peak, self.output(batch, layers[-1], grad=False))
