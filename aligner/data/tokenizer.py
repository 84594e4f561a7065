"""Load a model folder's tokenizer, and turn text and conversations into token ids one way everywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import; checking a configuration must not
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
ROLES_HINT = 'a list such as [{"role": "user", "content": "..."}]'

Message = dict[str, Any]


def load_tokenizer(path: str | Path, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer in a local model folder.

    Raises:
        ValueError: no folder, no tokenizer files, unreadable ones, no pad or end token, or more ids than the model has
            embeddings. The message says what to set in which file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{setting}={path} is not a folder; give a local Hugging Face model folder.")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ValueError(f"{setting}={path} has no tokenizer; it needs one of {', '.join(VOCABULARY_FILES)}.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ValueError(f"{setting}={path}: the tokenizer cannot be read: {type(error).__name__}: {error}") from error
    _check(tokenizer, folder, setting)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, folder: Path, setting: str) -> None:
    where = folder / "tokenizer_config.json"
    if tokenizer.eos_token_id is None:
        raise ValueError(f'{setting}={folder}: no end token; set "eos_token" in {where}, so that responses can end.')
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f'{setting}={folder}: no pad token; set "pad_token" in {where} '
            f"(the end token {tokenizer.eos_token!r} will do)."
        )
    config = folder / "config.json"
    if not config.is_file():
        return
    vocab_size = json.loads(config.read_text()).get("vocab_size")
    largest = max(tokenizer.get_vocab().values())
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise ValueError(
            f"{setting}={folder}: the tokenizer has token ids up to {largest}, but vocab_size in {config} is "
            f"{vocab_size}; use the tokenizer that the model was trained with, and for pad and end tokens "
            "such as its vocabulary has (others are added at its end)."
        )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the start of a sequence, with the tokenizer's own special tokens but never a second begin token."""
    written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=not written))


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that follows other tokens: nothing is added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], label: str, add_generation_prompt: bool
) -> str:
    """The conversation as the model's chat template writes it, special tokens included.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{label}: 'messages' needs a chat template but the tokenizer has none; "
            "set \"chat_template\" in its tokenizer_config.json, or give plain text as 'prompt'."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise whatever they like through jinja
        raise ValueError(f"{label}: the chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text


def checked_messages(value: Any, label: str, key: str = "messages") -> list[Message]:
    """`value`, which stands in the row under `key`, as a list of {'role': str, 'content': str}.

    Raises:
        ValueError: it is something else; `label` and the message's place are named.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{label}: {key!r} must be {ROLES_HINT}, not {_shortened(value)}.")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{label}: {key}[{i}] must have the texts 'role' and 'content', but is {_shortened(message)}."
            )
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
