"""Whether a checkpoint's files are those that its config.json describes, before a model is built."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import torch

from aligner.models.checkpoint import read_into
from aligner.models.family import Head, logical_tensors
from aligner.models.hf_folder import files_of_tensors
from aligner.models.spec import ModelSpec
from aligner.models.stored import SHARDS
from aligner.reshard.region import whole_tensor


def check_weights(spec: ModelSpec) -> None:
    """Every tensor is there and no other, and one element of each can be read.

    Raises:
        ValueError: a missing, misshapen or undeclared tensor, or a broken file; the message names it.
    """
    shapes = logical_tensors(spec)
    check_names(spec, shapes)
    wholes = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    corners = [piece.crop(piece.lo, (1,) * len(piece.size)) for piece in wholes]
    read_into(spec, corners, lambda piece: torch.empty(piece.size))


def check_names(spec: ModelSpec, known: Container[str]) -> None:
    """ValueError where the checkpoint holds a tensor that the model, as config.json describes it, would not use."""
    folder = Path(spec.path)
    if (folder / SHARDS).is_file():
        return
    replaced = spec.head is Head.SCALAR and spec.stored_head is Head.LANGUAGE
    # copies of what is known anyway, and the output layer where a scalar head takes its place
    harmless = (*(["lm_head.weight"] if spec.tied or replaced else ()), "rotary_emb.inv_freq")
    strange = sorted(n for n in files_of_tensors(folder) if n not in known and not n.endswith(harmless))
    if strange:
        raise ValueError(
            f"{folder} has a tensor {strange[0]}"
            + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
            + " which its config.json does not declare; the files are another model's, or config.json lacks a setting "
            "(num_hidden_layers, attention_bias, tie_word_embeddings and the like)."
        )
