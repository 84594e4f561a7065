"""transformers' model of a checkpoint on one rank of a role: packed rows, sharded by FSDP2, with the regions that it holds."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from aligner.models.spec import Head, ModelSpec
from aligner.models.transformers_model import HeadForm, empty_model, head_form, held_tensors
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Piece
from aligner.trainer.fsdp import attention
from aligner.trainer.fsdp.attention import NotPackable, Rows
from aligner.trainer.fsdp.collectives import use_cpu_collectives
from aligner.trainer.fsdp.fusion import fuse
from aligner.trainer.fsdp.layout import FsdpLayout
from aligner.trainer.fsdp.linear import use_products
from aligner.trainer.output_layer import PackedOutput
from aligner.trainer.packing import Packed
from aligner.trainer.readout import Readout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel

    from aligner.spmd.cpu_collectives import CpuCollectives

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Names in a configuration's layer_types that mix tokens by causal attention alone."""


@dataclass(frozen=True)
class ModelForm:
    """How a model is run, as it was observed without memory."""

    head: HeadForm
    explicit: bool
    """See `Rows.explicit`."""


def check_model(spec: ModelSpec) -> ModelForm:
    """Build the model without memory.

    Raises:
        ValueError: transformers has no such model; it mixes tokens by other things than causal attention of
            `AttentionInterface`, so that packed rows would run into each other; or its head is not supported.
    """
    attention.register()
    held_tensors(spec)
    model: Any = empty_model(spec.path, spec.head, trust_remote_code=spec.trust_remote_code)
    problem = _problem(model, spec)
    if problem:
        raise ValueError(
            f"{spec.path}: transformers' {type(model).__name__} {problem}, so rows that are packed into one sequence would run "
            "into each other; engine=fsdp does not support it."
        )
    head = head_form(model) if spec.head is Head.LANGUAGE else _scalar_head(model, spec)
    observed = empty_model(spec.path, spec.head, attention.OBSERVED, trust_remote_code=spec.trust_remote_code)
    try:
        calls = attention.observe(observed)
    except NotPackable as error:
        raise ValueError(f"{spec.path}: {error}") from error
    if calls is None:  # nothing was observed: by the names of transformers' own classes
        calls = [
            bool(getattr(model.config, "attn_logit_softcapping", None))
            or any(name.endswith("sinks") for name, _ in model.named_parameters())
        ]
    if not calls:
        raise ValueError(
            f"{spec.path}: transformers' {type(model).__name__} does not take its attention from transformers' "
            "AttentionInterface; engine=fsdp does not support it."
        )
    return ModelForm(head, any(calls))


def _problem(model: Any, spec: ModelSpec) -> str | None:
    """What mixes the tokens of packed rows, after the model's name; None: nothing that its class and its configuration say."""
    config = model.config
    others = sorted({*(getattr(config, "layer_types", None) or ())}.difference(_ATTENTION_LAYERS))
    if others or getattr(model, "_is_stateful", False):
        return f"has {others[0] if others else 'recurrent'} layers"
    if any(isinstance(module, nn.Conv1d) for module in model.base_model.modules()):
        return "has convolutions over tokens"
    if not getattr(model, "_supports_attention_backend", False):
        return "does not take its attention from transformers' AttentionInterface"
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        return "takes no positions of its tokens"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "attends to later tokens"
    if spec.tensors is not None and (kind := _rope_of_lengths(config)):
        return f"has rotary positions of type {kind!r}, which depend on the longest row"
    return None


def _scalar_head(model: Any, spec: ModelSpec) -> HeadForm:
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None or score.out_features != 1:
        raise ValueError(
            f"{spec.path}: transformers' {type(model).__name__} has no scalar head `score`; engine=fsdp does not support it."
        )
    return HeadForm()


def _rope_of_lengths(config: PreTrainedConfig) -> str | None:
    """A rotary type whose frequencies depend on the length of what is computed together; tables of families bound the length."""
    entry = getattr(config, "rope_parameters", None) or {}
    entries = [entry, *(value for value in entry.values() if isinstance(value, dict))]
    return next((kind for one in entries if (kind := one.get("rope_type")) in ("dynamic", "longrope")), None)


class PackedModel(nn.Module):
    """A whole forward pass, from a packed microbatch to its readouts, as one module: FSDP gathers the output layer with it."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, form: HeadForm, readout: Readout, rows: Rows) -> None:
        super().__init__()
        self.model, self.spec, self.form, self.readout, self.rows = model, spec, form, readout, rows

    def forward(self, batch: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """Readouts by name; see `Readout`."""
        self.rows.enter(batch)
        hidden_TH = self.model.base_model(
            input_ids=batch.tokens_T[None], position_ids=batch.positions_T[None], use_cache=False
        ).last_hidden_state[0]
        hidden_KH = hidden_TH if batch.kept_K is None else hidden_TH.index_select(0, batch.kept_K)
        readouts = self.readout(self.head(hidden_KH), batch, first_only)
        # FSDP hangs its hooks on what is returned, and a loss that changed a view in place would drop them
        return {name: value.clone() for name, value in readouts.items()}

    def head(self, hidden_KH: Tensor) -> PackedOutput:
        """The head's output for the kept tokens."""
        if self.spec.head is Head.SCALAR:
            return PackedOutput(self.model.score(hidden_KH).float(), self.spec.vocab)
        weight = self.model.get_output_embeddings().weight
        if self.form.scale != 1.0:
            hidden_KH = hidden_KH * self.form.scale
        # a gradient buffer that is not sharded takes the weight's gradient without a copy of it
        given = weight.grad if torch.is_grad_enabled() and not isinstance(self, FSDPModule) else None
        return PackedOutput(hidden_KH, self.spec.vocab, weight, weight_grad_VH=given, softcap=self.form.softcap)


class ShardedModel:
    """This rank's part of the model."""

    def __init__(self, root: PackedModel, layout: FsdpLayout, rank: int) -> None:
        self.root, self.layout, self._rank = root, layout, rank
        trained = dict(root.model.named_parameters())
        buffers = dict(root.model.named_buffers())
        self.parameters: dict[str, nn.Parameter] = {
            held.storage: trained[held.storage] for held in layout.held if held.trained
        }
        """By the layout's storage names, sharded: views alias them however the layers are gathered at the time."""
        self.buffers: dict[str, Tensor] = {
            held.storage: buffers[held.storage] for held in layout.held if not held.trained
        }
        self.whole = {name for name, value in {**self.parameters, **self.buffers}.items() if _is_whole(value)}
        """Names of what each rank has all of: parameters without dimensions, which cannot be cut, and buffers."""

    @property
    def is_sharded(self) -> bool:
        """FSDP runs it."""
        return isinstance(self.root, FSDPModule)

    def pieces(self) -> Sequence[Piece]:
        """The regions that this rank holds."""
        return self.layout.layout(self._rank)

    def view(self, piece: Piece) -> Tensor:
        """A writable strided view of what holds `piece`."""
        return strided_view(self.local(piece.storage), piece)

    def local(self, storage: str) -> Tensor:
        """This rank's rows of a parameter, without gradients."""
        held = self.parameters[storage] if storage in self.parameters else self.buffers[storage]
        return local_part(held).detach()


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def build_model(
    spec: ModelSpec,
    layout: FsdpLayout,
    rank: int,
    device: torch.device,
    mesh: DeviceMesh | None,
    readout: Readout,
    *,
    collectives: CpuCollectives | None,
    dtype: torch.dtype,
    frozen: bool,
    recompute: str,
    reshard_after_forward: bool,
) -> ShardedModel:
    """This rank's part of the model; its weights are undefined.

    Args:
        mesh: what weights are sharded over; None: they are whole here.
        collectives: those of the shards, on CPUs.
        dtype: of activations, and of the weights of a frozen model; others have float32 weights.
        recompute: none, selective (attention only) or full (each layer).

    Raises:
        ValueError: see `check_model`.
    """
    form = check_model(spec)
    model: Any = empty_model(spec.path, spec.head, attention.NAME, trust_remote_code=spec.trust_remote_code)
    # packed rows have no padding: where the pad token stands it is a token, and its row has a gradient
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        embedding.padding_idx = None
    fuse(model)
    if device.type == "cpu":
        use_products(model)
    rows = Rows(recompute == "selective", form.explicit)
    attention.use_rows(model, rows)
    layers = decoder_layers(model)
    if recompute == "full":
        for layer in layers:
            layer.forward = partial(_computed_again, layer.forward)  # type: ignore[method-assign]
    if frozen:
        for parameter in model.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(dtype)  # and no buffer: rotary frequencies stay float32
    root = PackedModel(model, spec, form.head, readout, rows).eval()
    if mesh is not None:
        # inputs keep their types: what a class computes in float32 inside a bfloat16 model, such as rotary angles, stays float32
        policy = (
            MixedPrecisionPolicy()
            if frozen or dtype is torch.float32
            else MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        )
        scalars = {parameter for parameter in model.parameters() if not parameter.dim()}  # which FSDP does not take
        for module in (*layers, root):
            again = None if module is root else reshard_after_forward  # the root's come last and are needed first
            sharded = fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=scalars
            )
            # gradients are summed: the loss is already divided by the global batch's denominators
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            # an expert that none of this rank's tokens chose has no gradient, where other ranks have one
            sharded.set_reduce_scatter_unused_params(True, recurse=False)
            if collectives is not None:
                use_cpu_collectives(sharded, collectives)
    _allocate(root, device, {f"model.{held.storage}" for held in layout.held})
    return ShardedModel(root, layout, rank)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are gathered and recomputed one after the other."""
    kinds = {*(model._no_split_modules or ())}
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    return layers or [*getattr(model.base_model, "layers", ())]


def _computed_again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward whose activations are computed again in the backward."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _allocate(root: PackedModel, device: torch.device, held: Collection[str]) -> None:
    """Give parameters memory and move buffers, whose values stay; `held`: the names of those that the checkpoint has."""
    values: Mapping[str, Tensor] = dict(root.named_buffers())
    root.to_empty(device=device)
    root.model.tie_weights()  # each module has got a parameter of its own
    with torch.no_grad():
        for name, buffer in root.named_buffers():
            if not values[name].is_meta:
                buffer.copy_(values[name])
            elif name not in held:
                raise ValueError(
                    f"{type(root.model).__name__} makes its buffer {name.removeprefix('model.')} without values, and no checkpoint holds it; "
                    "engine=fsdp does not support it."
                )
