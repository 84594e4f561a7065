"""Checks, before a model is built, that a checkpoint's files match its config.json."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aligner.models.agreement import check_reading
from aligner.models.checkpoint import read_into
from aligner.models.hf_folder import files_of_tensors, names_in_files, opened
from aligner.models.spec import Head, ModelSpec
from aligner.models.stored import KINDS
from aligner.models.tensors import (
    SCALAR_HEAD,
    architecture_of,
    classifier_of,
    embedding_tensor,
    layer_number,
    logical_tensors,
    output_tensor,
)
from aligner.reshard.plan.region import whole_tensor

CHUNK_ELEMENTS = 16 << 20
"""Elements compared at a time."""
_OTHERS = {
    "adapter_config.json": "the adapter that it describes would be left out: merge it first, with peft's "
    "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...), and use that folder",
    "hf_quant_config.json": "the engine would take the weights for quantized ones: use the model before quantization",
}
"""Files beside config.json with which other readers would load another model, and why."""


def check_weights(spec: ModelSpec) -> None:
    """Check that transformers interprets config.json alike, that the files hold exactly the model's tensors, that one element of
    each can be read, and that a tied output layer equals the embedding.

    Raises:
        ValueError: names the field, tensor or file that is wrong.
    """
    check_reading(spec)
    shapes = logical_tensors(spec)
    check_names(spec, shapes)
    wholes = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    corners = [piece.crop(piece.lo, (1,) * len(piece.size)) for piece in wholes]
    read_into(spec, corners, lambda piece: torch.empty(piece.size))
    if spec.tied and _is_hugging_face(spec):
        _check_tied(spec)


def check_names(spec: ModelSpec, known: Container[str]) -> None:
    """Raises ValueError if the checkpoint holds a tensor that the model of config.json does not use."""
    if not _is_hugging_face(spec):
        return
    folder = Path(spec.path)
    for other, why in _OTHERS.items():
        if (folder / other).is_file():
            raise ValueError(f"{folder} has an {other} beside its config.json, and {why}.")
    files = files_of_tensors(folder)
    _check_index(folder, files)
    # a copy of a tied embedding, or an output layer that a scalar head replaces
    replaced = spec.head is Head.SCALAR and spec.stored_head is Head.LANGUAGE
    ignored = {output_tensor(spec)} if spec.tied or replaced else set()
    left_out = [re.compile(pattern) for pattern in (spec.tensors.ignored if spec.tensors is not None else ())]
    undeclared = sorted(
        name
        for name in names_in_files(spec, files)
        if name not in known
        and name not in ignored
        and not _is_table(name)
        and not any(pattern.search(name) for pattern in left_out)
    )
    if undeclared:
        raise ValueError(
            f"{folder} has a tensor {undeclared[0]}"
            + (f" and {len(undeclared) - 1} more" if len(undeclared) > 1 else "")
            + f" which its config.json does not declare; {_remedy(spec, undeclared[0])}."
        )


def _is_hugging_face(spec: ModelSpec) -> bool:
    return not any((Path(spec.path) / file).is_file() for file in KINDS)


def _is_table(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which old releases of transformers stored needlessly."""
    return name.endswith("rotary_emb.inv_freq")


def _check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """Raises ValueError for tensors in the files that the index omits or misplaces: other readers would load them."""
    for file in sorted(set(files.values())):
        with opened(file) as tensors:
            names = tensors.keys()
            hidden = sorted(name for name in names if files.get(name) != file and not _is_table(name))
        if hidden:
            raise ValueError(
                f"{file} holds {hidden[0]}, which the index beside it "
                + (f"places in {files[hidden[0]].name}" if hidden[0] in files else "does not name")
                + "; write the checkpoint again, with transformers' save_pretrained(...)."
            )


def _remedy(spec: ModelSpec, name: str) -> str:
    number = layer_number(name)
    if number is not None and number >= spec.layers:
        return f"it has more layers than num_hidden_layers={spec.layers}"
    if name.endswith(".bias"):
        return "config.json lacks a setting (attention_bias or mlp_bias), or the files are another model's"
    if name == SCALAR_HEAD:
        return (
            f'for a model with a scalar head set architectures to ["{classifier_of(spec)}"], with one entry in id2label'
        )
    if name == output_tensor(spec):  # in a model with a scalar head
        return f'for a language model set architectures to ["{architecture_of(spec)}"], else take it out of the files'
    if spec.tensors is not None:
        return (
            "the files are another model's, or of an old release of transformers with other names: load them with "
            f"{spec.tensors.architecture}.from_pretrained(...), and write them with save_pretrained(...)"
        )
    return (
        "the files are another model's, or config.json lacks a setting (num_hidden_layers, attention_bias, "
        "tie_word_embeddings and the like)"
    )


def _check_tied(spec: ModelSpec) -> None:
    """Raises ValueError if a tied output layer is stored and differs from the embedding: transformers and vLLM would use it."""
    folder = Path(spec.path)
    files, name = files_of_tensors(folder), output_tensor(spec)
    if name not in files:
        return
    embedding = names_in_files(spec, files)[embedding_tensor(spec)]
    with opened(files[name]) as outputs, opened(files[embedding]) as embeddings:
        output, embedded = outputs.get_slice(name), embeddings.get_slice(embedding)
        shape = tuple(embedded.get_shape())
        differing = None if tuple(output.get_shape()) == shape else 0
        step = max(1, CHUNK_ELEMENTS // shape[1])
        for row in range(0, shape[0], step) if differing is None else ():
            if not _equal(output[row : row + step], embedded[row : row + step]):
                differing = row
                break
    if differing is not None:
        raise ValueError(
            f"{folder} has tie_word_embeddings=true in its config.json, and an {name} that is not {embedding} (as "
            "merged adapters leave it): transformers would use it, and it would be lost here. Set "
            f"tie_word_embeddings=false in config.json, or take {name} out of the files."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bitwise equality as float32, with NaN equal to itself."""
    return torch.equal(one.float().view(torch.int32), other.float().view(torch.int32))
