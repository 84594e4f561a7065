"""The tensors of one transformer layer, by arithmetic (no torch): what it saves for the backward, and what is there beside it while
it computes.

It follows the computation tensor by tensor, as `layers`, `attention` and `fused` and Megatron-core's modules make, save and free
them. Not counted: what a kernel takes for itself, and tensors with one number for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from aligner.models.family import Norms
from aligner.models.spec import QKNorm


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
    """Number of them that this rank's tokens go to at least: the fewer, the more an expert has at a time."""
    gradients: Gradients
    part: float
    """The largest temporary of an elementwise function, which a CPU takes in parts."""
    kept: float
    """Fraction of the tokens that go on after attention (see `attention.KeptTokens`): below 1 in the last layer alone."""

    @cached_property
    def rest(self) -> Layer:
        """What comes after attention, of the kept tokens."""
        names = ("residual", "whole", "norm", "both", "dispatched", "routing")
        return replace(self, **{name: getattr(self, name) * self.kept for name in names}, kept=1.0)

    def temporary(self, size: float) -> float:
        """Of a function whose tensors have this size."""
        return min(size, self.part)

    @property
    def qkv(self) -> float:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys

    def forward(self, t: Tensors, grad: bool, training: bool = True) -> None:
        """Beside the layer's input; what the backward needs and `output` are left, without `grad` the output alone.

        Args:
            training: else the residual is added in place, unless there is a norm between.
        """
        self._attention(t, grad, training or self.norms.after_attention is not None)
        self.rest._mlp(t, grad, training or self.norms.after_mlp is not None)
        if self.recompute == "mlp":
            t.free(*OF_MLP)
        t.only(*(SAVED if grad else ()), "output")

    def _norm(self, t: Tensors, grad: bool, **result_and_saved: float) -> None:
        """A norm; without `grad` nothing of what it would save is left."""
        t.make(**result_and_saved)
        if not grad:
            t.free(list(result_and_saved)[1])

    def _attention(self, t: Tensors, grad: bool, adds: bool) -> None:
        """`sum` is left, and what is saved."""
        if self.norms.before_attention:
            self._norm(t, grad, normed=self.residual, norm1=self.norm)
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
        if self.kept < 1:
            t.make(kept_core=self.queries * self.kept)
            if not grad or self.recompute == "selective":
                t.free("core")
        rest = self.rest
        t.make(projected=rest.residual * adds)
        if self.norms.after_attention:
            self._norm(t, grad, normed_projected=rest.residual, norm2=rest.norm)
        t.make(sum=rest.residual)
        if self.kept < 1:
            t.during(kept_input=rest.residual)
        if not self.norms.after_attention:
            t.free("projected")
        t.free("normed_projected", *(["rotated"] if grad and self.copies and self.recompute != "selective" else []))
        if not grad:
            t.only("sum")

    def _mlp(self, t: Tensors, grad: bool, adds: bool) -> None:
        """`output` is left, and what is saved."""
        if self.norms.before_mlp:
            self._norm(t, grad, normed_sum=self.residual, norm3=self.norm)
        if self.dispatched:
            self._experts(t, grad)
        else:
            t.make(both=self.both)
            if self.mlp_bias:
                t.during(biased=self.both)
            t.make(gated=self.both / 2)
            t.during(activated=self.temporary(self.both / 2))
        t.make(mlp_output=self.residual * adds)
        if self.norms.after_mlp:
            self._norm(t, grad, normed_output=self.residual, norm4=self.norm)
        t.make(output=self.residual)
        t.free("joined_outputs", "normed_output", *(() if self.norms.after_mlp else ("mlp_output",)))

    def _experts(self, t: Tensors, grad: bool) -> None:
        """One expert after the other; without `grad` nothing is left of one but its outputs."""
        t.make(routing=self.routing, permuted=self.dispatched)
        t.make(dispatched=self.dispatched)  # sorted by expert
        both, last = (
            (self.both, self.dispatched) if grad else (self.both / self.experts, self.dispatched / self.experts)
        )
        t.make(outputs_before=self.dispatched - last)
        t.make(both=both, gated=both / 2)
        t.during(activated=self.temporary(self.both / 2 / self.experts))
        t.make(weighted=both / 2)  # by the router's probabilities
        if not grad:
            t.free("both", "gated", "weighted")
        t.make(outputs=last)
        t.make(joined_outputs=self.dispatched)
        t.free("outputs", "outputs_before", "permuted")

    def backward(self, t: Tensors) -> None:
        """What `forward` has left, and `grad` of the output, are there; the gradient of the input is left."""
        if self.recompute == "mlp":
            self.rest._mlp_again(t)
        self.rest._mlp_backward(t)
        self._attention_backward(t)

    def _mlp_again(self, t: Tensors) -> None:
        """What recompute makes again of `OF_MLP`; the output that comes along is not wanted."""
        if not self.dispatched:
            t.make(both=self.both, gated=self.both / 2)
            t.during(again=self.residual)
            return
        t.make(routing=self.routing, dispatched=self.dispatched, both=self.both, gated=self.both / 2)
        t.make(weighted=self.both / 2)
        t.during(outputs_again=self.dispatched, joined_again=self.dispatched, again=self.residual)

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
        if self.kept < 1:
            t.make(grad_stream=self.residual)
        if self.norms.after_attention:
            t.make(grad_projected=self.rest.residual)
            t.free("projected", "norm2")
        t.make(grad_kept_core=self.queries * self.kept, grad_proj=self.gradients.proj)
        t.free("grad_proj", "joined", "grad_projected", "kept_core")
        if self.kept < 1:
            t.make(grad_core=self.queries)
            t.free("grad_sum", "grad_kept_core")
        if self.recompute == "selective":
            t.make(again=self.queries + self.logsumexp + self.qkv * self.copies)
        if self.gathered:
            t.make(gathered=self.gathered, rows=self.gathered, sent=2 * self.keys)
            t.free("gathered", "sent")
            t.make(grad_rows=self.gathered)
        t.make(grad_rotated=self.queries + self.keys, grad_values=self.keys)
        t.free(
            "rotated",
            "values",
            "core",
            "logsumexp",
            "again",
            "copies",
            "grad_core",
            "grad_kept_core",
            "rows",
            "grad_rows",
        )
        t.make(grad_normed_qk=self.queries + self.keys)
        t.free("grad_rotated")
        t.make(grad_qkv=self.qkv)
        t.free("grad_normed_qk", "grad_values", "grouped", "raw_queries", "raw_keys", "scaled", "qkv")
        t.make(grad_normed=self.whole, grad_qkv_weight=self.gradients.qkv)
        t.free("grad_qkv_weight", "grad_qkv", "normed")
        t.make(grad_input=self.residual)


SAVED = (
    "normed", "norm1", "qkv", "grouped", "raw_queries", "raw_keys", "scaled", "rotated", "values", "copies", "joined", "core", "kept_core", "logsumexp", "projected",
    "norm2", "sum", "normed_sum", "norm3", "routing", "dispatched", "both", "gated", "weighted", "mlp_output", "norm4",
)  # fmt: skip
"""Names of what the backward needs of a layer, as far as `forward` has left them."""
OF_MLP = ("routing", "dispatched", "both", "gated", "weighted")
"""Names of what recompute=mlp does not leave: all but the MLP's input."""


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
    layer.forward(inference, grad=False, training=False)
    layer.forward(saving, grad=True)
    kept = saving.now
    if layer.recompute != "full":
        # the next layer's input, which it holds, is this one's output
        forward = saving.most
        saving.make(grad=layer.rest.residual)
        saving.most = saving.now
        layer.backward(saving)
        return LayerMost(forward, kept, saving.most, inference.most)
    saving.make(grad=layer.rest.residual)
    layer.backward(saving)
    again = Tensors()
    layer.forward(again, grad=False)
    # the output of the layer that is computed again stays until its backward is through
    return LayerMost(again.most, layer.rest.residual, saving.most + layer.rest.residual, inference.most)
