"""Load a model folder's tokenizer; the one place that turns text and conversations into token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # transformers takes seconds to import; checking a configuration must not
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
ANCHORS = ("\n", ".", ":", "a", "\u0378")
"""Prefixes for tokenizing a continuation; the first whose tokens do not merge with it is used. The last is an unassigned
code point."""
ROLES_HINT = 'a list such as [{"role": "user", "content": "..."}]'

Message = dict[str, Any]


def load_tokenizer(path: str | Path, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer in a local model folder.

    Raises:
        ValueError: no folder, no or unreadable tokenizer files, no pad or end token, or more ids than the model has
            embeddings; the message names the file and the key to set.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{setting}={path} is not a folder; give a local Hugging Face model folder.")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ValueError(f"{setting}={path} has no tokenizer; it needs one of {', '.join(VOCABULARY_FILES)}.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ValueError(f"{setting}={path}: the tokenizer cannot be read: {type(error).__name__}: {error}") from error
    _check(tokenizer, folder, setting)
    return tokenizer


def use_chat_template(
    tokenizer: PreTrainedTokenizerBase, file: str | Path, setting: str = "data.chat_template"
) -> None:
    """Give the tokenizer the chat template in a file, in place of its own.

    Raises:
        ValueError: a file that cannot be read, or is not a template; the message has the line.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{setting}={file} is not a file; give a chat template (jinja), or null for the tokenizer's.")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={file} cannot be read: {error}.") from None
    if not template.strip():
        raise ValueError(f"{setting}={file} is empty; give a chat template (jinja), or null for the tokenizer's.")
    tokenizer.chat_template = template
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{setting}={file}: line {error.lineno} of the template is wrong: {error.message}") from None
    except Exception:  # a template may refuse this conversation; what it makes of the rows shows when they are read
        pass


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
            f"{vocab_size}; use the tokenizer that the model was trained with, and pad and end tokens from "
            "its vocabulary (others are added at its end)."
        )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text at the start of a sequence: with the special tokens that the tokenizer prepends (not twice, if the text
    already has them), without those that it appends (an end token)."""
    if tokenizer.is_fast:
        encoding = tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False)
        ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
        begin, end = 0, len(ids)
        while begin < end and added[begin]:
            begin += 1
        while end > begin and added[end - 1]:
            end -= 1
        before, body = ids[:begin], ids[begin:end]
    else:
        ids, body = list(tokenizer.encode(text)), encode_plain(tokenizer, text)
        places = range(len(ids) - len(body) + 1)
        before = ids[: next((k for k in places if ids[k : k + len(body)] == body), 0)]
    return body if body[: len(before)] == before else before + body


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that already has its special tokens, such as a rendered conversation."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that follows other tokens: no special tokens, and no prefix space as SentencePiece tokenizers add before
    the first word."""
    for anchor in ANCHORS:
        before, whole = encode_plain(tokenizer, anchor), encode_plain(tokenizer, anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return encode_plain(tokenizer, text)


def encode_answered(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids as in generation, answer ids): those of prompt + answer tokenized as one text, except that no token spans
    the boundary, because in generation the prompt is tokenized alone."""
    prompt_ids, whole = encode_text(tokenizer, prompt), encode_text(tokenizer, prompt + answer)
    clean = whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids)
    return prompt_ids, whole[len(prompt_ids) :] if clean else encode_continuation(tokenizer, answer)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    label: str,
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with the model's chat template, including special tokens.

    Args:
        label: the row's file and line, for errors.
        options: further variables of the template, such as tools.

    Raises:
        ValueError: the tokenizer has no template, or the template raises for these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{label}: 'messages' needs a chat template but the tokenizer has none; "
            "set \"chat_template\" in its tokenizer_config.json, or give plain text as 'prompt'."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(options or {})
        )
    except Exception as error:  # templates raise whatever they like through jinja
        raise ValueError(f"{label}: the chat template rejects these messages: {error}") from error
    assert isinstance(text, str)
    return text


def checked_messages(value: Any, label: str, key: str = "messages") -> list[Message]:
    """`value` (the row's `key`) as a list of messages {'role': str, 'content': text or list of text parts}; a turn with
    'tool_calls' may have no content.

    Raises:
        ValueError: it is something else; names the row and the message.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{label}: {key!r} must be {ROLES_HINT}, not {shortened(value)}.")
    for i, message in enumerate(value):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and content:
            _check_parts(content, f"{label}: {key}[{i}]")
        elif not isinstance(content, str) and not (
            isinstance(message, dict) and content is None and message.get("tool_calls")
        ):
            _refuse_message(message, f"{label}: {key}[{i}]")
        if not isinstance(message.get("role"), str):
            _refuse_message(message, f"{label}: {key}[{i}]")
    return value


def _refuse_message(message: Any, place: str) -> NoReturn:
    raise ValueError(
        f"{place} must have 'role' and 'content' as texts (or a list of text parts, or 'tool_calls'), but is "
        f"{shortened(message)}."
    )


def _check_parts(parts: list[Any], place: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{place}: 'content' has a part of type {kind!r}; only text models are supported, so give parts such as "
                f'{{"type": "text", "text": "..."}}.'
            )


def shortened(value: Any) -> str:
    """repr of a value, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
