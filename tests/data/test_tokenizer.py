"""Loading a tokenizer, its refusals, and encoding without doubled special tokens."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.preferences import tokenize_preferences
from aligner.data.prompts import tokenize_prompts
from aligner.data.tokenizer import encode_continuation, encode_text, load_tokenizer, render_chat, use_chat_template


def change(folder: Path, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    merged = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def test_the_character_tokenizer_loads_and_round_trips(character_folder: Path) -> None:
    tokenizer = load_tokenizer(character_folder)
    text = "<bos>137+485=7+5+0=12 ~!\n#622"
    ids = encode_text(tokenizer, text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert len(ids) == len(text) - len("<bos>") + 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<bos>")
    assert len(tokenizer.get_vocab()) == 128
    assert encode_continuation(tokenizer, "é") == [tokenizer.unk_token_id]


def test_a_begin_token_is_never_doubled(chat: PreTrainedTokenizerBase) -> None:
    zero, one = (chat.convert_tokens_to_ids(digit) for digit in "01")
    assert encode_text(chat, "01") == [0, zero, one]
    assert encode_text(chat, "<s>01") == [0, zero, one]
    assert encode_continuation(chat, "01") == [zero, one]


@pytest.mark.parametrize("before", [[], ["<s>"], ["<s>", "<|start|>"]])
def test_an_end_token_after_every_text_is_none_of_a_prompts(chat: PreTrainedTokenizerBase, before: list[str]) -> None:
    """add_eos_token, or a post-processor that was saved with one."""
    ids = [(token, chat.convert_tokens_to_ids(token)) for token in (*before, "<|end|>")]
    chat._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(before)} $A <|end|>".strip(), special_tokens=ids
    )
    zero, end = (chat.convert_tokens_to_ids(token) for token in ("0", "<|end|>"))
    begin = [number for token, number in ids if token != "<|end|>"]
    assert chat.encode("0") == [*begin, zero, end]
    assert encode_text(chat, "0") == encode_text(chat, f"{''.join(before)}0") == [*begin, zero]
    assert encode_text(chat, "0<|end|>") == [*begin, zero, end], "one that is written is meant"
    (prompt,) = tokenize_prompts([("p", {"prompt": "0"})], chat, 9)
    ((demonstration,), _) = tokenize_demonstrations([("d", {"prompt": "0", "completion": "0"})], chat, 9)
    ((pair,), _) = tokenize_preferences([("p", {"prompt": "0", "chosen": "0<|end|>", "rejected": "1"})], chat, 9)
    assert prompt.tokens == demonstration.tokens[: demonstration.prompt_len] == (*begin, zero)
    assert demonstration.tokens == pair.chosen.tokens == (*begin, zero, zero, end)


def test_missing_folders_and_files_are_named(tmp_path: Path, chat_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path=.*absent is not a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"policy\.path=.* has no tokenizer; it needs one of tokenizer\.json"):
        load_tokenizer(tmp_path, setting="policy.path")
    (chat_folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match=r"model\.path=.*the tokenizer cannot be read"):
        load_tokenizer(chat_folder)


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_a_missing_token_is_named_with_the_file_to_change(chat_folder: Path, token: str) -> None:
    change(chat_folder, **{token: None})
    with pytest.raises(ValueError, match=rf'set "{token}" in .*tokenizer_config\.json'):
        load_tokenizer(chat_folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<new>"},
        {"eos_token": "<new>"},
        {"unk_token": "<new>"},
        {"additional_special_tokens": ["<tool>", "<new>"]},
        {"extra_special_tokens": {"image_token": "<new>"}},
    ],
)
def test_any_special_token_beyond_the_embeddings_is_refused(chat_folder: Path, settings: dict[str, object]) -> None:
    (chat_folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 262}))
    change(chat_folder, **settings)
    with pytest.raises(ValueError, match=r"token ids up to 26[23], but vocab_size in .*config.json is 262"):
        load_tokenizer(chat_folder)
    (chat_folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 320}))
    assert len(load_tokenizer(chat_folder)) <= 264, "a model may have more embeddings than there are tokens"


def test_an_added_token_beyond_the_embeddings_is_refused(chat_folder: Path) -> None:
    """One that is no special token."""
    file = chat_folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 262, "content": "<tool_call>", **flags})
    file.write_text(json.dumps(tokenizer))
    (chat_folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 262}))
    with pytest.raises(ValueError, match=r"token ids up to 262, but vocab_size in .*config.json is 262"):
        load_tokenizer(chat_folder)


def test_token_ids_beyond_the_embeddings_are_refused(chat_folder: Path) -> None:
    (chat_folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 262}))
    assert load_tokenizer(chat_folder) is not None
    change(chat_folder, pad_token="<new pad>")
    with pytest.raises(ValueError, match=r"token ids up to 262, but vocab_size in .*config.json is 262"):
        load_tokenizer(chat_folder)


def test_a_missing_or_refusing_chat_template_is_named(chat: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "hello"}]
    chat.chat_template = "{{ raise_exception('system turn wanted') }}"
    with pytest.raises(ValueError, match="row:3: the chat template rejects these messages: system turn wanted"):
        render_chat(chat, messages, "row:3", add_generation_prompt=True)
    chat.chat_template = None
    with pytest.raises(ValueError, match=r"row:3: 'messages' needs a chat template.*tokenizer_config\.json"):
        render_chat(chat, messages, "row:3", add_generation_prompt=True)


def test_a_template_file_replaces_the_tokenizers(chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", encoding="utf-8")
    use_chat_template(chat, file)
    assert render_chat(chat, [{"role": "user", "content": "é"}], "r:1", False) == "[user] é\n"
    chat.chat_template = {"default": "a", "tool_use": "b"}  # type: ignore[assignment]
    use_chat_template(chat, file)
    assert render_chat(chat, [{"role": "user", "content": "é"}], "r:1", False, {"tools": [{}]}) == "[user] é\n"
    file.write_text("{{ raise_exception('this conversation not') }}")
    use_chat_template(chat, file)  # what it refuses shows with the rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is not a file; give a chat template"),
        (b" \n", "is empty; give a chat template"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"{% for m in messages %}\n{{ m.content }", "line 2 of the template is wrong: unexpected '}'"),
        (b"\n\n{{ 1 | no_such_filter }}", "line 3 of the template is wrong: No filter named 'no_such_filter'"),
    ],
)
def test_a_template_file_that_is_none_is_named(
    chat: PreTrainedTokenizerBase, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.chat_template={re.escape(str(file))}:? {re.escape(reason)}"):
        use_chat_template(chat, file)
