"""What ends a turn, by the model's files, its tokenizer, its template and its data; worked by hand for each template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.end_tokens import (
    TemplateEnd,
    closing_tokens,
    find_ends,
    main,
    special_among,
    special_ids,
    template_end,
    trained_ends,
)
from aligner.data.preferences import tokenize_preferences
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.byte_level import LETTERS, make_tokenizer

SPECIAL = ("<eos>", "<start>", "<end>", "<s>", "<user>", "<assistant>", "<return>", "<sep>")
EOS, START, END, BOS, USER, ASSISTANT, RETURN, SEP = range(LETTERS, LETTERS + len(SPECIAL))
EACH = "{% for m in messages %}"
CHATML = (
    EACH
    + "<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
Make = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(template: str | None = CHATML, **more: Any) -> PreTrainedTokenizerBase:
        return make_tokenizer(tmp_path / "model", SPECIAL, template, bos="<s>", **more)

    return made


def configured(tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": LETTERS + len(SPECIAL), **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, END),
        # as Llama 3: no newline after it, content trimmed
        (EACH + "<start>{{ m.role }}\n\n{{ m.content | trim }}<end>{% endfor %}", END),
        # as Phi-3: the tokenizer's own end follows after the last turn
        (EACH + "<user>{{ m.content }}<end>\n{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", END),
        # as Llama 2: a blank before it, a begin token before each question, no system messages
        (
            EACH + "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} "
            "<end>{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}",
            END,
        ),
        # as gpt-oss: the last turn ends otherwise than those before it
        (EACH + "<start>{{ m.role }}{{ m.content }}{% if loop.last %}<return>{% else %}<end>{% endif %}{% endfor %}", RETURN),
        (EACH + "{{ m.role }}: {{ m.content | upper }}  \n\n<end>{% endfor %}", END),  # rewritten
        (EACH + "{{ m.role }}: {% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<end>{% endfor %}", END),
        (EACH + "{{ m.role }}: {{ m.content }}### Over<end>{% endfor %}", END),  # the text before it is the answer's
        ("{% if messages[0].role != 'system' %}{{ raise_exception('') }}{% endif %}" + CHATML, END),
        (EACH + "{{ m.role }}: {{ m.content[0].text }}<end>{% endfor %}", END),  # wants parts
        (EACH + "<sep>{{ m.role }}: {{ m.content }}{% endfor %}<sep>", SEP),  # between all turns
        (EACH + "<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>", END),  # opens the next turn by itself
        (EACH + "{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}", EOS),
        # none of these ends a turn
        (EACH + "<{{ m.role }}>{{ m.content }}{% endfor %}", None),
        (EACH + "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>", None),  # a role's token
        (EACH + "{{ m.role }}: {{ m.content }}<s>{% endfor %}", None),  # a begin token
        (EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        (EACH + "{% if m.role == 'user' %}{{ m.content }}<end>{% endif %}{% endfor %}", None),  # drops the answer
        ("{{ raise_exception('never') }}", None),
        ("{% if %}", None),  # no template at all
        (None, None),
    ],
)  # fmt: skip
def test_what_a_template_closes_turns_with(make: Make, template: str | None, token: int | None) -> None:
    assert template_end(make(template)) == TemplateEnd(token)


def test_a_turn_that_plain_text_closes_has_no_stop_token(make: Make, tmp_path: Path) -> None:
    tokenizer = make(EACH + "### {{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endfor %}")
    assert template_end(tokenizer) == TemplateEnd(None, "<|im_end|>")
    ends = find_ends(configured(tmp_path, {"eos_token_id": EOS}), tokenizer)
    assert ends.ids == (EOS,)
    assert ends.disagreement == (
        "the chat template closes turns with the text '<|im_end|>', which is not a single special token: only "
        f"<eos> ({EOS}) can end a response"
    )


def test_another_template_on_the_same_tokenizer(make: Make) -> None:
    tokenizer = make(CHATML)
    assert template_end(tokenizer).token == END
    tokenizer.chat_template = EACH + "{{ m.content }}<return>{% endfor %}"
    assert template_end(tokenizer).token == RETURN


def test_a_base_model_with_another_end_in_its_template(make: Make, tmp_path: Path) -> None:
    tokenizer, folder = make(), configured(tmp_path, {"eos_token_id": EOS}, {"eos_token_id": [EOS, 7], "top_k": 20})
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    answers, _ = tokenize_demonstrations([("r", row)], tokenizer, 99)
    ends = find_ends(folder, tokenizer, answers)
    assert ends.ids == (EOS, 7, END)
    assert ends.disagreement == (
        f"what ends a turn differs: config.json <eos> ({EOS}), generation_config.json <eos> ({EOS}) and ( (7), "
        f"the tokenizer <eos> ({EOS}), the chat template <end> ({END}), the trained answers <end> ({END}); "
        "generation stops at all of them, and exports name all"
    )
    assert ends.shown(ends.ids) == f"<eos> ({EOS}) and ( (7) and <end> ({END})"


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": END}, None),
        ({"eos_token_id": [END, EOS]}, None),
        ({"eos_token_id": EOS}, {"eos_token_id": [END, EOS]}),  # as Qwen2.5-Instruct and Llama-3-Instruct have it
        ({}, {"eos_token_id": END}),
    ],
)
def test_nothing_is_said_where_the_files_name_all(
    make: Make, tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    tokenizer = make(eos="<end>")
    ends = find_ends(configured(tmp_path, config, generation), tokenizer)
    assert ends.disagreement is None and set(ends.ids) <= {END, EOS}


def test_an_end_that_the_tokenizer_does_not_know_is_said(make: Make, tmp_path: Path) -> None:
    folder = configured(tmp_path, {"vocab_size": 500, "eos_token_id": [EOS, 499]})
    ends = find_ends(folder, make(None))
    assert ends.ids == (EOS, 499)
    assert "config.json <eos> (256) and 499 (no token)" in str(ends.disagreement)


def test_the_last_trained_token_of_each_turn(make: Make) -> None:
    tokenizer = make(
        EACH + "{{ m.role }}{{ m.content }}{% if m.role == 'assistant' %}{{ m.end }}{% endif %}{% endfor %}"
    )
    answers = [
        TokenizedAnswer((65, 66, 67, END, 68, 69, RETURN), (False, False, True, True, False, True, True), 2, {}),
        TokenizedAnswer((65, 66, END), (False, True, True), 1, {}),
        TokenizedAnswer((65, 66, 67), (False, True, True), 1, {}),  # cut off: plain text ends no turn
        TokenizedAnswer((65, BOS), (False, True), 1, {}),
        TokenizedAnswer((65, END), (False, False), 1, {}),  # only read
    ]
    assert trained_ends(answers, tokenizer) == (END, RETURN)
    inside = TokenizedAnswer((65, RETURN, 66, END), (False, True, True, True), 1, {})
    assert trained_ends([*answers, inside], tokenizer) == (END,), "a token of answers ends no turn"
    assert trained_ends([*answers, inside], tokenizer, known=[RETURN]) == (END, RETURN)
    assert trained_ends(
        [TokenizedAnswer((65, END, 66, END), (False, True, True, True), 1, {})], tokenizer, whole=True
    ) == (END,)


def test_blanks_that_were_added_as_tokens_are_text(tmp_path: Path) -> None:
    template = EACH + "{{ m.content }}\n\n{% endfor %}"
    tokenizer = make_tokenizer(tmp_path / "model", ["<eos>"], template)
    tokenizer.add_tokens(["\n\n"])
    newline = len(tokenizer) - 1
    assert template_end(tokenizer) == TemplateEnd()
    assert trained_ends([TokenizedAnswer((65, newline), (False, True), 1, {})], tokenizer) == ()
    assert special_among(tokenizer, [newline, 65, LETTERS]) == (LETTERS,)


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_preferences_end_as_they_are_trained(make: Make, kind: str) -> None:
    """Texts get the tokenizer's end token, unless they end a turn as the template does."""
    tokenizer = make()
    assert closing_tokens(tokenizer) == {EOS, END}
    if kind == "texts":
        row: dict[str, Any] = {"prompt": "<start>a\n", "chosen": "b<end>", "rejected": "c"}
        wanted: tuple[int, ...] = (END, EOS)
    else:
        row = {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        }
        wanted = (END,)
    ((pair,), _) = tokenize_preferences([("p", row)], tokenizer, 99)
    chosen = [token for token, trained in zip(pair.chosen.tokens, pair.chosen.mask, strict=True) if trained]
    assert tokenizer.convert_ids_to_tokens(chosen) == ["b", "<end>"]
    assert trained_ends([pair.chosen, pair.rejected], tokenizer) == wanted


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        (
            {"eos_token_id": 400},
            None,
            r"config\.json: eos_token_id=400, but the model's vocab_size is 264, .* 0 to 263",
        ),
        ({"eos_token_id": [1, 264]}, None, r"config\.json: eos_token_id=\[1, 264\], but the model's vocab_size is 264"),
        ({"pad_token_id": 264}, None, r"config\.json: pad_token_id=264"),
        ({"bos_token_id": 9999}, None, r"config\.json: bos_token_id=9999"),
        ({"eos_token_id": -1}, None, r"config\.json: eos_token_id=-1 is not a token id; use an integer from 0 on"),
        ({"eos_token_id": "2"}, None, r'config\.json: eos_token_id="2" is not a token id'),
        ({"eos_token_id": True}, None, r"config\.json: eos_token_id=true is not a token id"),
        ({"eos_token_id": [1.0]}, None, r"config\.json: eos_token_id=\[1\.0\] is not a token id"),
        ({"pad_token_id": -2}, None, r"config\.json: pad_token_id=-2 is not a token id"),
        ({}, {"eos_token_id": [2, 300]}, r"generation_config\.json: eos_token_id=\[2, 300\], but"),
        ({}, {"pad_token_id": 300}, r"generation_config\.json: pad_token_id=300, but"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        special_ids(configured(tmp_path, config, generation))


def test_ids_that_say_none(tmp_path: Path) -> None:
    found = special_ids(configured(tmp_path, {"eos_token_id": [], "pad_token_id": -1, "bos_token_id": None}))
    assert set(found.values()) == {()}


def test_serving_gets_the_end_that_the_folder_lacks(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder printed is read by transformers as vLLM does; nothing is printed where the folder names all."""
    make()
    folder = configured(tmp_path, {"eos_token_id": EOS}, {"eos_token_id": EOS, "temperature": 0.25, "do_sample": True})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main(str(folder))
    out, err = capsys.readouterr()
    found = GenerationConfig.from_pretrained(out.strip())
    assert (found.eos_token_id, found.temperature) == ([EOS, END], 0.25)
    assert err.startswith("serve.sh: what ends a turn differs: config.json")
    assert [path.name for path in Path(out.strip()).iterdir()] == ["generation_config.json"]
    configured(tmp_path, {"eos_token_id": EOS}, {"eos_token_id": [EOS, END]})
    main(str(folder))
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_cannot_be_trained_may_be_served(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No pad token, no end token, ids beyond the model: what can be said is said, and the server decides."""
    make()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = configured(tmp_path, {"eos_token_id": END})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None, "eos_token": None}))
    main(str(folder))
    assert capsys.readouterr() == ("", "")
    configured(tmp_path, {"eos_token_id": 9999})
    main(str(folder))
    out, err = capsys.readouterr()
    assert out == "" and "stop tokens are left to the server (ValueError: " in err and "eos_token_id=9999" in err
