"""Mistakes in data as people have it: over the kinds of files, data.columns and the named formats of data.format.

`ROWS` are files of two rows: a good one of each format, then a wrong one; a case names the wrong row's place.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.format_rows import ALPACA, ANTHROPIC, CHATLEARN_PAIR, DAPO, GSM8K, HH, MATH, ORIGINAL, SHAREGPT, TULU

Row = dict[str, Any]
PROMPTS = "data.eval_path=null data.prompts_per_step=1 data.max_prompt_tokens=400 rollout.max_model_len=512 data.path={bad}/data/"
SFT = "algorithm=sft data=demonstrations data.eval_path=null ~algorithm.group_size data.prompts_per_step=1 data.max_tokens=512 data.path={bad}/data/"
DPO = SFT.replace("algorithm=sft data=demonstrations", "algorithm=dpo data=preferences")


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _turn(row: Row, column: str, number: int, **changes: Any) -> Row:
    turns = [dict(turn) for turn in row[column]]
    turns[number] |= changes
    return {**row, column: turns}


ROWS: dict[str, tuple[Row, Row]] = {
    "gsm8k_column": (GSM8K, {"problem": "1+1", "answer": "#### 2"}),
    "gsm8k_type": (GSM8K, {**GSM8K, "question": 7}),
    "gsm8k_marker": (GSM8K, {**GSM8K, "answer": "It is 72."}),
    "gsm8k_nothing": (GSM8K, {**GSM8K, "answer": "It is 72.\n#### "}),
    "math_box": (MATH, {**MATH, "solution": "It is 7."}),
    "math_open": (MATH, {**MATH, "solution": "It is \\boxed{7."}),
    "math_empty": (MATH, {**MATH, "problem": "  "}),
    "dapo_reward": (DAPO, _without(DAPO, "reward_model")),
    "dapo_truth": (DAPO, {**DAPO, "reward_model": {"style": "rule"}}),
    "dapo_prompt": (DAPO, {**DAPO, "prompt": [{"role": "user"}]}),
    "deepscaler": ({"problem": "1+1", "answer": "2", "solution": ""}, {"problem": "1+1", "answer": 2, "solution": ""}),
    "uf_score": (ORIGINAL, _turn(ORIGINAL, "completions", 1, overall_score=None)),
    "uf_response": (ORIGINAL, {**ORIGINAL, "completions": [{"overall_score": 1.0}] * 2}),
    "uf_none": (ORIGINAL, {**ORIGINAL, "completions": []}),
    "uf_sides": (TULU, {"chosen": TULU["messages"], "rejected": "Paris"}),
    "uf_same": (TULU, {"chosen": TULU["messages"], "rejected": TULU["messages"]}),
    "hh_start": (HH, {**HH, "chosen": "Hello\n\nAssistant: Hi."}),
    "hh_type": (HH, {**HH, "rejected": None}),
    "hh_diverge": (HH, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}),
    "hh_empty": (HH, {**HH, "rejected": "\n\nHuman: Hello there\n\nAssistant: Hi.\n\nHuman: What is it?\n\nAssistant:"}),
    "tulu_role": (TULU, _turn(TULU, "messages", 1, role=None)),
    "tulu_text": (TULU, {"messages": "Hello"}),
    "tulu_end": (TULU, {"messages": TULU["messages"][:3]}),
    "sharegpt_from": (SHAREGPT, _turn(SHAREGPT, "conversations", 1, **{"from": "narrator"})),
    "sharegpt_value": (SHAREGPT, {"conversations": [{"from": "human", "text": "a"}]}),
    "sharegpt_call": (SHAREGPT, {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]}),
    "sharegpt_first": (SHAREGPT, {"conversations": SHAREGPT["conversations"][1:]}),
    "alpaca_output": (ALPACA, _without(ALPACA, "output")),
    "alpaca_empty": (ALPACA, {**ALPACA, "output": " "}),
    "alpaca_history": (ALPACA, {**ALPACA, "history": [["a"]]}),
    "anthropic_block": (ANTHROPIC, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
    "anthropic_role": (ANTHROPIC, {"messages": [{"role": "system", "content": "a"}]}),
    "anthropic_tool": (ANTHROPIC, {**ANTHROPIC, "tools": [{"name": "f"}]}),
    "openai_pair": ({"messages": TULU["messages"]}, {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}),
    "chatlearn_scores": (CHATLEARN_PAIR, {**CHATLEARN_PAIR, "score": [1.0]}),
    "chatlearn_one": (CHATLEARN_PAIR, {"query": "a", "response": "b"}),
    "chatlearn_query": (CHATLEARN_PAIR, {"question": "a"}),
    "math_answer": (MATH, {**MATH, "answer": ["5/6"]}),
    "hh_late": (HH, {**HH, "rejected": HH["rejected"].replace("What is it?", "What else?")}),
    "alpaca_system": (ALPACA, {**ALPACA, "system": "Be brief."}),
    "openai_arguments": (
        {"messages": TULU["messages"]},
        {"messages": [TULU["messages"][0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
    ),
    "nested": ({"q": {"text": "a"}, "turns": [{"content": "b"}]}, {"q": {"body": "a"}, "turns": []}),
}  # fmt: skip


def write_bad_data(folder: Path) -> None:
    """The files of these cases."""
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist([{"question": "1+1=", "answer": "2"}, {"question": None, "answer": "2"}])
    pq.write_table(table, folder / "null.parquet")
    (folder / "cut.parquet").write_bytes((folder / "null.parquet").read_bytes()[:-30])
    (folder / "cells.csv").write_text("prompt,answer\n1+1=,2\n1,2,3\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "1"}\n' * 99)[:-12])
    (folder / "list.json").write_text('[{"prompt": "1"}, "2"]')
    for number in (1, 2):
        (folder / f"empty-{number}.jsonl").write_text("\n")
    (folder / "shards").mkdir()
    for split in ("train_sft", "test_sft"):
        pq.write_table(table, folder / "shards" / f"{split}-00000-of-00001.parquet")


Mistake = tuple[str, tuple[str, ...]]
"""(overrides, what the error must say)."""


def _row(start: str, name: str, given: str, *said: str) -> Mistake:
    return f"{start}{name}.jsonl {given}", (f"{{bad}}/data/{name}.jsonl:2", *said)


BAD_DATA: dict[str, Mistake] = {
    "gsm8k_column": _row(PROMPTS, "gsm8k_column", "data.format=gsm8k", "no column 'question' (the row has problem, answer)", "data.format=gsm8k expects 'question' and 'answer' as texts"),
    "gsm8k_type": _row(PROMPTS, "gsm8k_type", "data.format=gsm8k", "column 'question' must be text, not 7"),
    "gsm8k_marker": _row(PROMPTS, "gsm8k_marker", "data.format=gsm8k", "column 'answer' has no final answer after '####'"),
    "gsm8k_nothing": _row(PROMPTS, "gsm8k_nothing", "data.format=gsm8k", "no final answer after '####'"),
    "math_no_box": _row(PROMPTS, "math_box", "data.format=math", "no \\boxed{{}} answer, and there is no column 'answer'"),
    "math_open_box": _row(PROMPTS, "math_open", "data.format=math", "column 'solution' has no \\boxed{{}} answer"),
    "math_empty": _row(PROMPTS, "math_empty", "data.format=math data.chat=false", "'prompt' is empty"),
    "dapo_no_reward_model": _row(PROMPTS, "dapo_reward", "data.format=dapo_17k", "no column 'reward_model'", "data.format=dapo_17k expects 'prompt' as messages"),
    "dapo_no_truth": _row(PROMPTS, "dapo_truth", "data.format=verl", "reward_model: there is no 'ground_truth'"),
    "dapo_prompt": _row(PROMPTS, "dapo_prompt", "data.format=dapo_17k", "prompt[0] must have 'role' and 'content'"),
    "deepscaler_answer": _row(PROMPTS, "deepscaler", "data.format=deepscaler", "column 'answer' must be text, not 2"),
    "ultrafeedback_score": _row(DPO, "uf_score", "data.format=ultrafeedback", "completions[1]: 'overall_score' must be a number, not None"),
    "ultrafeedback_response": _row(DPO, "uf_response", "data.format=ultrafeedback", "completions[0]: there is no column 'response'"),
    "ultrafeedback_none": _row(DPO, "uf_none", "data.format=ultrafeedback", "column 'completions' is an empty list"),
    "pair_side": (f"{DPO}uf_sides.jsonl data.format=tulu3_preference", ("{bad}/data/uf_sides.jsonl:1", "no column 'chosen' (the row has id, source, messages)")),
    "pair_same": _row(f"data.on_error=skip {DPO}", "uf_same", "data.format=tulu3_preference", "no pair is left (wrong rows: 2)", "diverge at message 4"),
    "hh_start": _row(DPO, "hh_start", "data.format=hh_rlhf", "column 'chosen' must begin with '\\n\\nHuman:'"),
    "hh_missing": _row(DPO, "hh_type", "data.format=hh_rlhf", "there is no column 'rejected'"),
    "hh_diverge": _row(DPO, "hh_diverge", "data.format=hh_rlhf", "these diverge at message 0"),
    "hh_empty": _row(DPO, "hh_empty", "data.format=hh_rlhf", "is an assistant turn with an empty 'content'"),
    "tulu_role": _row(SFT, "tulu_role", "data.format=tulu3_sft", "messages[1] must have 'role' and 'content' as texts"),
    "tulu_text": _row(SFT, "tulu_text", "data.format=tulu3_sft", "column 'messages' must be a list, not 'Hello'"),
    "tulu_end": _row(SFT, "tulu_end", "data.format=tulu3_sft", "must not begin with an assistant turn, and must end with one"),
    "sharegpt_from": _row(SFT, "sharegpt_from", "data.format=sharegpt", "conversations[1]: 'from' is 'narrator', which is none of human, user, gpt"),
    "sharegpt_value": _row(SFT, "sharegpt_value", "data.format=sharegpt", "conversations[0]: there is no column 'value' (the row has from, text)"),
    "sharegpt_call": _row(SFT, "sharegpt_call", "data.format=sharegpt", "'value' of a function_call must be JSON with 'name' and 'arguments', not 'f(x)'"),
    "sharegpt_first": _row(SFT, "sharegpt_first", "data.format=sharegpt", "must not begin with an assistant turn"),
    "alpaca_output": _row(SFT, "alpaca_output", "data.format=alpaca", "there is no column 'output'"),
    "alpaca_empty": _row(SFT, "alpaca_empty", "data.format=alpaca", "is an assistant turn with an empty 'content'"),
    "alpaca_history": _row(SFT, "alpaca_history", "data.format=alpaca", "history[0] must be a list of a question and an answer"),
    "anthropic_image": _row(SFT, "anthropic_block", "data.format=anthropic", "messages[0]: content[0]: 'type' is 'image', which is no block of text in a turn of the user"),
    "anthropic_role": _row(SFT, "anthropic_role", "data.format=anthropic", "'role' is 'system', which is none of user, assistant"),
    "anthropic_tool": _row(SFT, "anthropic_tool", "data.format=anthropic", "tools[0]: there is no column 'input_schema'"),
    "openai_pair": _row(SFT, "openai_pair", "data.format=openai", "input: column 'messages' is an empty list"),
    "chatlearn_scores": _row(DPO, "chatlearn_scores", "data.format=chatlearn", "'response' has 2 items and 'score' has 1"),
    "chatlearn_one_answer": _row(DPO, "chatlearn_one", "data.format=chatlearn", "data.kind=preferences needs two answers to a prompt"),
    "chatlearn_query": _row(DPO, "chatlearn_query", "data.format=chatlearn", "there is no column 'prompt' (the row has question)"),
    "math_answer": _row(PROMPTS, "math_answer", "data.format=math", "column 'answer' must be text or a number, not ['5/6']"),
    "hh_late": _row(DPO, "hh_late", "data.format=hh_rlhf data.chat=false", "'chosen' and 'rejected' differ before the last answer"),
    "alpaca_system": _row(SFT, "alpaca_system", "data.format=alpaca data.chat=false", "column 'system' is for models with a chat template"),
    "openai_arguments": _row(SFT, "openai_arguments", "data.format=openai", "messages[1].tool_calls[0]: function: column 'arguments' must be an object, not '{{x'"),
    "files_empty": (f"{PROMPTS}empty-*.jsonl", ("data.path={bad}/data/empty-*.jsonl has no rows: its 2 files are empty",)),
    "nested_column": _row(SFT, "nested", "data.columns={{prompt:q.text,completion:'turns[0].content'}}", "no 'q.text' (data.columns.prompt=q.text): 'q' has body"),
    "nested_item": (f"{SFT}nested.jsonl data.columns={{{{prompt:q.text,completion:'turns[1].content'}}}}", ("{bad}/data/nested.jsonl:1", "no 'turns[1].content'", "'turns' is a list of 1")),
    "column_of_none": (f"{SFT}nested.jsonl data.columns={{{{prompt:'[0]'}}}}", ("data.columns.prompt=[0] is no column; write a name, a.b, or messages[0].content",)),
    "column_null": (f"{PROMPTS}null.parquet data.columns={{{{prompt:question}}}}", ("{bad}/data/null.parquet, row 2", "'question' is null (data.columns.prompt=question); give each row a value")),
    "parquet_cut": (f"{PROMPTS}cut.parquet", ("cut.parquet is a damaged parquet file", "fetch it again")),
    "csv_cells": (f"{PROMPTS}cells.csv", ("{bad}/data/cells.csv:3 has 3 cells, and the header has 2 columns (prompt, answer)",)),
    "gzip_cut": (f"{PROMPTS}cut.jsonl.gz", ("cut.jsonl.gz is compressed (gzip) and damaged or cut short", "fetch it again")),
    "json_item": (f"{PROMPTS}list.json", ("{bad}/data/list.json, row 2 is a JSON str, not an object",)),
    "split": (f"{PROMPTS}shards", ("data.path={bad}/data/shards has no files of the split train; use data.split=test_sft or train_sft",)),
    "hub_offline": ("data.path=openai/gsm8k", ("data.path=openai/gsm8k does not exist here", "HF_HUB_OFFLINE=0")),
    "format_unknown": ("data.format=gsm9k", ("data.format=gsm9k is unknown; use gsm8k, math",)),
    "format_kind": (f"{DPO}gsm8k_type.jsonl data.format=gsm8k", ("data.format=gsm8k gives prompts, demonstrations, not data.kind=preferences",)),
    "streamed_positions": (
        "algorithm=sft data=demonstrations data.eval_path=null ~algorithm.group_size data.path={task}/demonstrations.jsonl "
        "data.streaming=true data.max_tokens=1024",
        ("a demonstration may have 1024 tokens, beyond the 512 positions", "set data.max_tokens=512"),
    ),
    "on_error": ("data.on_error=drop", ("data.on_error=drop is unknown; use stop, skip",)),
}  # fmt: skip
