"""Tokenizers on disk: the product's own, and one that adds begin tokens by itself and merges letters into words."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aligner.data.column_addition import write_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def character_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def characters(character_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(character_folder))


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """Byte-level with the merges "4 5" and "2 3"; writes <s> itself; chats in ChatML with the end token <|end|>."""
    special = ["<s>", "<|start|>", "<|end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, "45", "23"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("4", "5"), ("2", "3")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / "chat"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def chat(chat_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(chat_folder))
