"""Models as only transformers knows them: where parameters hold the checkpoint's tensors, what follows the output layer, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    GPTJConfig,
    ModernBertDecoderConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from aligner.models.checkpoint import read_into
from aligner.models.read_spec import read_spec
from aligner.models.spec import Head, with_scalar_head
from aligner.models.tensors import classifier_of, logical_tensors, new_tensors, parameter_count
from aligner.models.transformers_model import HeadForm, empty_model, head_form, held_tensors
from aligner.models.verify_checkpoint import check_weights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import whole_tensor
from aligner.spmd.mesh import Mesh
from aligner.trainer.config import PolicyConfig
from aligner.trainer.engines import backend
from aligner.trainer.fsdp.model import check_model
from tests.trainer.fsdp.families import FAMILIES, MLA, SIZES, save_model

FORMS = {
    "gemma2": HeadForm(softcap=2.0),
    "gemma3n_text": HeadForm(softcap=2.0),
    "granite": HeadForm(scale=0.25),
    "cohere2": HeadForm(scale=0.3),
    "minicpm3": HeadForm(scale=48 / 128),  # before the output layer
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    spec = read_spec(tmp_path)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert logical_tensors(spec) == stored
    pieces = [piece for held in held_tensors(spec) for piece in held.pieces]
    assert {piece.name: piece.size for piece in pieces} == stored
    assert head_form(empty_model(tmp_path, Head.LANGUAGE)) == FORMS.get(family, HeadForm())


@pytest.mark.parametrize(
    ("family", "unused", "message"),
    [
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", None),  # as Pythia's files have it
        ("deepseek_v3", "model.layers.61.eh_proj.weight", None),  # predicts one token more
        ("deepseek_v3", "model.layers.3.mlp.gate.weight", "more layers than num_hidden_layers=3"),
        ("gpt2", "h.0.attn.bias", None),
        ("gpt2", "h.0.ln_1.weight", r"GPT2LMHeadModel\.from_pretrained\(\.\.\.\), and write them with save_pretrained"),
    ],
)
def test_tensors_that_the_class_does_not_use_may_be_there(
    family: str, unused: str, message: str | None, tmp_path: Path
) -> None:
    save_model(family, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), unused: torch.zeros(1)}, file, {"format": "pt"})
    spec = read_spec(tmp_path)
    assert unused not in logical_tensors(spec)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_weights(spec)


def test_a_scalar_head_takes_the_place_of_the_output_layer(tmp_path: Path) -> None:
    save_model("gpt_neox", tmp_path)
    language = read_spec(tmp_path)
    scalar = with_scalar_head(language)
    assert logical_tensors(language).keys() ^ logical_tensors(scalar).keys() == {"embed_out.weight", "score.weight"}
    assert new_tensors(scalar) == {"score.weight"} and not new_tensors(language)
    assert {piece.name for held in held_tensors(scalar) for piece in held.pieces} == logical_tensors(scalar).keys()


def written(folder: Path, config: PreTrainedConfig, **changes: Any) -> Path:
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (PhiConfig(**SIZES), {}, "PhiForCausalLM: its output layer is no matrix alone"),
        (FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), {}, "AttentionInterface"),
        (GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=2, rotary_dim=8), {}, "AttentionInterface"),
        (Qwen3NextConfig(**SIZES, num_experts=4), {}, "Qwen3NextForCausalLM has linear_attention layers"),
        (DogeConfig(**SIZES), {}, "DogeAttention makes a mask of its own for each query and key"),
        (ModernBertDecoderConfig(**SIZES, decoder_bias=False), {}, "computes its logits by .*native_layer_norm around the output layer"),
        (FAMILIES["smollm3"], {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        (FAMILIES["smollm3"], {"architectures": ["LlamaForCausalLM"]}, "is not that of architecture LlamaForCausalLM"),
        (FAMILIES["smollm3"], {"architectures": ["SmolForCausalLM"]}, "transformers' class .* is SmolLM3ForCausalLM"),
        (FAMILIES["smollm3"], {"model_type": "newer"}, "transformers cannot read it: .*newer"),
        (FAMILIES["smollm3"], {"hidden_act": "newer"}, "cannot make a SmolLM3ForCausalLM of hidden_act='newer': KeyError: 'newer'"),
        (FAMILIES["smollm3"], {"auto_map": {"AutoModelForCausalLM": "a.B"}}, "code of the checkpoint's own"),
        (FAMILIES["smollm3"], {"quantization_config": {"bits": 4}}, "use the model before quantization"),
    ],
)  # fmt: skip
def test_what_packed_rows_do_not_allow_is_refused(
    config: PreTrainedConfig, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(read_spec(written(tmp_path, config, **changes)))


def test_a_model_that_no_host_has_memory_for_is_read(tmp_path: Path) -> None:
    config = DeepseekV3Config(**{**MLA, "n_routed_experts": 4, "n_group": 1, "moe_intermediate_size": 1 << 30})
    spec = read_spec(written(tmp_path, config))
    check_model(spec)
    assert parameter_count(spec) > 1 << 40


def test_outputs_have_names_whatever_the_folder_says(tmp_path: Path) -> None:
    folder = written(tmp_path, FAMILIES["smollm3"], return_dict=False)
    assert empty_model(folder, Head.LANGUAGE).config.return_dict is True


def test_a_head_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    save_model("granite", tmp_path)
    with pytest.raises(ValueError, match="no class of model_type='granite' with a scalar head"):
        check_model(with_scalar_head(read_spec(tmp_path)))


def test_megatron_names_the_backend_that_runs_it(tmp_path: Path) -> None:
    save_model("granite", tmp_path)
    spec, mesh = read_spec(tmp_path), Mesh((0,), name="policy")
    with pytest.raises(ValueError, match=r"GraniteForCausalLM .*is not supported; use policy\.engine=fsdp"):
        backend("megatron").check(spec, mesh, PolicyConfig(), False, True)
    backend("fsdp").check(spec, mesh, PolicyConfig(engine="fsdp"), False, True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granite", {"hidden_act": "relux"}, r"cannot make a GraniteForCausalLM of hidden_act='relux': KeyError"),
        ("granite", {"num_key_value_heads": 0}, "cannot make a GraniteForCausalLM of num_key_value_heads=0: ZeroDiv"),
        ("granite", {"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, found 0"),
        ("granite", {"max_position_embeddings": -1}, "max_position_embeddings must be a positive whole number"),
        ("granite", {"intermediate_size": 0}, r"leave nothing of model\.layers\.0\.mlp\.\w+\.weight, of shape"),
        ("granite", {"dtype": ["float32"]}, r"dtype=\['float32'\] is not supported"),
        ("granite", {"dtype": ""}, "dtype='' is not supported"),
        ("granite", {"hidden_size": "128"}, r"config\.json: transformers cannot read it: .*hidden_size"),
        ("gpt2", {"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] must be a name"),
    ],
)
def test_values_that_make_no_model_are_one_error(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, FAMILIES[family], **changes))


def test_rotary_positions_that_change_with_the_longest_row_bound_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    entry = {**rope, "factor": 4.0, "original_max_position_embeddings": 32}
    assert read_spec(written(tmp_path, FAMILIES["granite"], rope_parameters=entry)).max_positions == 32
    assert read_spec(written(tmp_path, FAMILIES["granite"])).max_positions == 128


def gpt2_as_published(folder: Path) -> None:
    """GPT-2's own checkpoint: names without the prefix, and causal masks that older releases stored."""
    save_model("gpt2", folder)
    tensors = load_file(folder / "model.safetensors")
    stored = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(3)}
    save_file({**stored, **masks}, folder / "model.safetensors", metadata={"format": "pt"})


def pythia_as_published(folder: Path) -> None:
    """Pythia's checkpoints hold masks and rotary frequencies."""
    save_model("gpt_neox", folder)
    layer = "gpt_neox.layers.0.attention."
    more = {f"{layer}bias": torch.ones(1, 1, 128, 128).tril(), f"{layer}masked_bias": torch.tensor(-1e9)}
    more[f"{layer}rotary_emb.inv_freq"] = torch.ones(4)
    save_file(
        {**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def deepseek_with_a_layer_for_later_tokens(folder: Path) -> None:
    """DeepSeek-V3's layer 61 predicts the token after the next."""
    save_model("deepseek_v3", folder)
    more = {"model.layers.61.eh_proj.weight": torch.ones(2, 2)}
    save_file(
        {**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", metadata={"format": "pt"}
    )


@pytest.mark.parametrize("publish", [gpt2_as_published, pythia_as_published, deepseek_with_a_layer_for_later_tokens])
def test_checkpoints_are_read_as_transformers_reads_them(publish: Callable[[Path], None], tmp_path: Path) -> None:
    publish(tmp_path)
    spec = read_spec(tmp_path)
    check_weights(spec)
    wholes = [whole_tensor(name, shape, "float32") for name, shape in logical_tensors(spec).items()]
    read = {piece.name: torch.empty(piece.size) for piece in wholes}
    read_into(spec, wholes, lambda piece: strided_view(read[piece.name], piece))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = revert_weight_conversion(model, {name: value.detach() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, expected[name]) for name, value in read.items())


def test_a_tensor_that_the_class_does_not_leave_out_is_refused(tmp_path: Path) -> None:
    pythia_as_published(tmp_path)
    more = {"gpt_neox.layers.3.attention.dense.weight": torch.ones(2, 2)}
    save_file({**load_file(tmp_path / "model.safetensors"), **more}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"gpt_neox\.layers\.3\.attention\.dense\.weight which its config\.json does not"
    ):
        check_weights(read_spec(tmp_path))


def test_the_class_with_a_scalar_head_has_its_name(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    assert classifier_of(read_spec(tmp_path)) == "GPT2ForSequenceClassification"
