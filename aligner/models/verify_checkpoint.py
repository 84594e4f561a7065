"""Whether a checkpoint's files are those that its config.json describes, before a model is built."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aligner.models.agreement import check_reading
from aligner.models.checkpoint import read_into
from aligner.models.hf_folder import files_of_tensors, opened
from aligner.models.spec import Head, ModelSpec
from aligner.models.stored import KINDS
from aligner.models.tensors import EMBEDDING, OUTPUT, SCALAR_HEAD, family_of, layer_number, logical_tensors
from aligner.reshard.plan.region import whole_tensor

CHUNK_ELEMENTS = 16 << 20
"""Read at once where two tensors are compared."""
_OTHERS = {
    "adapter_config.json": "the adapter that it describes would be left out: merge it first, with peft's "
    "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...), and use that folder",
    "hf_quant_config.json": "the engine would take the weights for quantized ones: use the model before quantization",
}
"""Files beside config.json that make another model of it for other readers."""


def check_weights(spec: ModelSpec) -> None:
    """Transformers reads the same config.json alike, every tensor is there and no other, one element of each can be read,
    and a tied output layer is the embedding.

    Raises:
        ValueError: a field that is read otherwise, a missing, misshapen or undeclared tensor, or a broken file; the message names it.
    """
    check_reading(spec)
    shapes = logical_tensors(spec)
    check_names(spec, shapes)
    wholes = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    corners = [piece.crop(piece.lo, (1,) * len(piece.size)) for piece in wholes]
    read_into(spec, corners, lambda piece: torch.empty(piece.size))
    if spec.tied and _is_hugging_face(spec):
        _check_tied(Path(spec.path))


def check_names(spec: ModelSpec, known: Container[str]) -> None:
    """ValueError where the checkpoint holds a tensor that the model, as config.json describes it, would not use."""
    if not _is_hugging_face(spec):
        return
    folder = Path(spec.path)
    for other, why in _OTHERS.items():
        if (folder / other).is_file():
            raise ValueError(f"{folder} has an {other} beside its config.json, and {why}.")
    files = files_of_tensors(folder)
    _check_index(folder, files)
    # copies of what is known anyway, and the output layer where a scalar head takes its place
    replaced = spec.head is Head.SCALAR and spec.stored_head is Head.LANGUAGE
    harmless = {OUTPUT} if spec.tied or replaced else set()
    strange = sorted(n for n in files if n not in known and n not in harmless and not _is_table(n))
    if strange:
        raise ValueError(
            f"{folder} has a tensor {strange[0]}"
            + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
            + f" which its config.json does not declare; {_remedy(spec, strange[0])}."
        )


def _is_hugging_face(spec: ModelSpec) -> bool:
    return not any((Path(spec.path) / file).is_file() for file in KINDS)


def _is_table(name: str) -> bool:
    """Rotary frequencies, which old releases of transformers stored and all of them compute."""
    return name.endswith("rotary_emb.inv_freq")


def _check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """Other readers load all that is in the files, whatever the index says."""
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
    family = family_of(spec)
    if name == SCALAR_HEAD:
        return (
            f'for a model with a scalar head set architectures to ["{family.classifier}"], with one entry in id2label'
        )
    if name == OUTPUT:  # of a model with a scalar head
        return f'for a language model set architectures to ["{family.architecture}"], else take it out of the files'
    return (
        "the files are another model's, or config.json lacks a setting (num_hidden_layers, attention_bias, "
        "tie_word_embeddings and the like)"
    )


def _check_tied(folder: Path) -> None:
    """Transformers ties an output layer that is stored too only where it is the embedding, and so does the engine."""
    files, embedding = files_of_tensors(folder), EMBEDDING
    if OUTPUT not in files:
        return
    with opened(files[OUTPUT]) as outputs, opened(files[embedding]) as embeddings:
        output, embedded = outputs.get_slice(OUTPUT), embeddings.get_slice(embedding)
        shape = tuple(embedded.get_shape())
        differing = None if tuple(output.get_shape()) == shape else 0
        step = max(1, CHUNK_ELEMENTS // shape[1])
        for row in range(0, shape[0], step) if differing is None else ():
            if not _equal(output[row : row + step], embedded[row : row + step]):
                differing = row
                break
    if differing is not None:
        raise ValueError(
            f"{folder} has tie_word_embeddings=true in its config.json, and an {OUTPUT} that is not {embedding} (as "
            "merged adapters leave it): transformers would use it, and it would be lost here. Set "
            f"tie_word_embeddings=false in config.json, or take {OUTPUT} out of the files."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """To the bit, as float32: a value that is no number equals itself."""
    return torch.equal(one.float().view(torch.int32), other.float().view(torch.int32))
