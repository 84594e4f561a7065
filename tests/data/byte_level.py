"""A byte-level tokenizer with any special tokens and any chat template, as a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from aligner.data.tokenizer import load_tokenizer

LETTERS = len(pre_tokenizers.ByteLevel.alphabet())
"""Ids of plain text; the special tokens follow in their order."""


def make_tokenizer(
    folder: Path,
    special: Sequence[str],
    template: str | None = None,
    eos: str = "<eos>",
    bos: str | None = None,
    words: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Written to `folder` and read from there. The first special token should be `eos`, which also pads; each of `words` is one
    token of plain text, with an id after those of `special`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "additional_special_tokens": list(special)}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)
