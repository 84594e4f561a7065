"""tools/show_data.py: what is shown is what is trained, on five configurations, in every form of output."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from aligner.data.demonstrations import tokenize_demonstrations
from tests.data.tokenizer_kinds import tokenizer_of
from tools.show_data import main, visible

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ASKED = "<|im_start|>user↵\n{}<|im_end|>↵\n<|im_start|>assistant↵\n"
TALK = [
    {"role": "system", "content": "Be brief."},
    user("Capital of France?"),
    says("Paris 😀"),
    user("More?"),
    says("No."),
]
CASES: dict[str, tuple[str, list[str], list[dict[str, Any]], list[str]]] = {
    "demonstrations": (
        "chatml", ["data=demonstrations"], [{"messages": TALK}],
        [f"<|im_start|>system↵\nBe brief.<|im_end|>↵\n{ASKED.format('Capital of France?')}[+Paris 😀+][=<|im_end|>=]↵\n"
         f"{ASKED.format('More?')}[+No.+][=<|im_end|>=]↵\n"],
    ),
    "split": (
        "forgets_thought", ["data=demonstrations"],
        [{"messages": [user("2+2?"), says("<think>\ntwo\n</think>\n\n4."), user("3+3?"), says("6.")]}],
        ["(1 of the conversations split into several rows", "(part 1 of 2: ",
         f"{ASKED.format('2+2?')}[+<think>↵\ntwo↵\n</think>↵\n↵\n4.+][=<|im_end|>=]↵\n\n(part 2 of 2: ",
         f"{ASKED.format('2+2?')}4.<|im_end|>↵\n{ASKED.format('3+3?')}[+<think>↵\n↵\n</think>↵\n↵\n6.+][=<|im_end|>=]"],
    ),
    "preferences": (
        "tools", ["data=preferences"],
        [{"prompt": [user("Rain?")], "chosen": [says(None, tool_calls=[CALL])], "rejected": [says("No idea.")], "tools": TOOLS}],
        ['(chosen: ', '[+<tool_call>↵\n{"name": "weather", "arguments": {"city": "Oslo"}}↵\n</tool_call>+][=<|im_end|>=]',
         "(rejected: ", "[+No idea.+][=<|im_end|>=]", "Tools: "],
    ),
    "prompts": (
        "forgets_thought", ["data.system_prompt=Think.", "data.max_prompt_tokens=20", "+data.chat_template_kwargs.enable_thinking=false"],
        [{"messages": [{"role": "system", "content": "Own."}, user("2+2?")], "answer": "4"}],
        ["(prompt: ", "(a reward is given answer='4')", "<|im_start|>system↵\nThink.<|im_end|>", "more than data.max_prompt_tokens=20: an error", "[-", "</think>↵\n↵\n-]"],
    ),
    "feedback": (
        "opens_thought", ["data=feedback"],
        [{"prompt": "1+1=", "completion": "2\x1b[31m", "label": True}, {"prompt": "1+1=", "completion": "", "label": False}],
        ["(good answer: ", "1+1=[+2\\x1b[31m+][=</s>=]", "error: ", "'completion' is empty"],
    ),
}  # fmt: skip


def run(tmp_path: Path, case: str, *more: str) -> int:
    template, overrides, rows, _ = CASES[case]
    tokenizer_of("byte_level", template).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main([*more, *overrides, f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'rows.jsonl'}"])


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_trained_is_marked(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(tmp_path, case)
    output = capsys.readouterr().out
    assert status == int(case in ("feedback", "prompts")), "1 for a row that would stop the job"
    for wanted in CASES[case][3]:
        assert wanted in output, output
    assert "\x1b" not in output, "no escape of the terminal's, of ours or of the data"


def test_a_row_that_is_left_out_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "prompts", "data.too_long=drop") == 0
    assert "more than data.max_prompt_tokens=20: left out" in capsys.readouterr().out


def test_a_row_that_is_skipped_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "feedback", "data.on_error=skip") == 0
    assert "error: " in capsys.readouterr().out


def test_lengths_are_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    ((row,), _) = tokenize_demonstrations([("d", {"messages": TALK})], tokenizer, 1000)
    run(tmp_path, "demonstrations")
    count, trained = len(row.tokens), sum(row.mask)
    line = f"({count} tokens: {trained} trained ({trained / count:.0%}), 2 of them ends)"
    output = capsys.readouterr().out
    assert line in output
    assert output.endswith(f"1 rows, 1 sequences, {count} tokens, {trained} trained ({trained / count:.0%})\n\n")


def test_colors_mark_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "demonstrations", "--color", "always")
    output = capsys.readouterr().out
    assert "\x1b[32mParis 😀\x1b[0m\x1b[1;30;42m<|im_end|>\x1b[0m\x1b[2m↵\n" in output and "[+" not in output


def test_the_page_has_every_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "demonstrations", "--html", str(tmp_path / "rows.html"))
    page = (tmp_path / "rows.html").read_text()
    spans = re.findall(r'<span class="(\w+)" title="([\d ]+)">(.*?)</span>', page, re.DOTALL)
    tokenizer = tokenizer_of("byte_level", "chatml")
    ((row,), _) = tokenize_demonstrations([("d", {"messages": TALK})], tokenizer, 1000)
    assert [int(token) for _, ids, _ in spans for token in ids.split()] == list(row.tokens)
    text = html.unescape("".join(text for _, _, text in spans))
    assert text == visible(tokenizer.decode(row.tokens))
    on = [part in ("trained", "end") for part, ids, _ in spans for _ in ids.split()]
    assert on == list(row.mask)


def test_every_source_and_the_held_out_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_of("byte_level", "chatml").save_pretrained(tmp_path / "model")
    for name in ("a", "b", "held"):
        lines = [json.dumps({"messages": [user(f"{name}{number}")]}) + "\n" for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [f"data.sources.{name}.path={tmp_path / name}.jsonl" for name in ("a", "b")]
    common = [f"model.path={tmp_path / 'model'}", *paths, f"data.eval_path={tmp_path / 'held.jsonl'}"]
    assert main(["--rows", "2", "--skip", "1", *common, "data.sources.b.system_prompt=Rhyme."]) == 0
    output = capsys.readouterr().out
    shown = re.findall(r"user↵\n(\w+)<", output)
    assert shown == ["a1", "a2", "b1", "b2"] and output.count("Rhyme.") == 2
    assert f"=== data.sources.b: data.sources.b.path={tmp_path / 'b.jsonl'}, 4 rows" in output
    assert main(["--heldout", *common]) == 0
    assert re.findall(r"user↵\n(\w+)<", capsys.readouterr().out) == ["held0", "held1", "held2"]


def test_a_mistake_in_a_source_has_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_of("byte_level", "chatml").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [user("a")]}))
    source = f"data.sources.b={{path: {tmp_path / 'rows.jsonl'}, chat_template_kwargs: {{thinking: true}}}}"
    assert main([f"model.path={tmp_path / 'model'}", source]) == 2
    assert "error: data.sources.b.chat_template_kwargs.thinking is not a variable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--rows", "0"], "--rows 0 --skip 0: give --rows of at least 1"),
        (["--heldout"], "--heldout needs held-out rows; set data.eval_path"),
        (["data.paht=x"], "there is no setting data.paht; did you mean data.path"),
        (["data.path=/nowhere.jsonl"], "data.path=/nowhere.jsonl"),
        (["data.chat_template=/nowhere.jinja"], "data.chat_template=/nowhere.jinja is not a file"),
    ],
)
def test_mistakes_end_it_with_2(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_of("byte_level", "chatml").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [user("a")]}))
    path = [] if any(one.startswith("data.path") for one in more) else [f"data.path={tmp_path / 'rows.jsonl'}"]
    assert main([f"model.path={tmp_path / 'model'}", *path, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and reason in captured.err
