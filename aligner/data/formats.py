"""data.format: the data sets that everybody uses, by their schemas -> rows of ours.

A format turns a row into the richest row of ours that it holds: {'prompt', 'completion'} as texts, {'messages'},
{'prompt', 'chosen', 'rejected'} or {'query', 'response', 'score'}; `row_of_kind` makes of that what data.kind wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aligner.data.chat_formats import anthropic, openai, sharegpt
from aligner.data.checked_columns import FormatRow, Row
from aligner.data.json_text import parsed
from aligner.data.tokenizer import checked_messages, shortened

ANSWERED = ("prompts", "demonstrations")
COMPARED = ("prompts", "demonstrations", "preferences", "feedback")
BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace, or what a backslash makes another sign (\\{ is none)."""
TURN = re.compile(r"\n\n(Human|Assistant):")
ALPACA = {
    True: (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    False: (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
}
"""Stanford Alpaca's prompts for models without a chat template, with and without an input."""


@dataclass(frozen=True)
class Format:
    """One schema."""

    convert: Callable[[FormatRow, bool], Row]
    """From a row, and whether the model has a chat template, to a row of ours."""
    schema: str
    """Its columns, for errors and the documentation."""
    kinds: tuple[str, ...]
    """Values of data.kind that it can give."""
    of: str
    """The data sets that have it."""


def gsm8k(row: FormatRow, chat: bool) -> Row:
    """The answer is what follows "####", without thousands separators."""
    solution = row.text("answer")
    _, marker, final = solution.rpartition("####")
    if not marker or not final.strip():
        row.fail("column 'answer' has no final answer after '####'")
    fields = {**row.rest("question", "answer"), "answer": final.strip().replace(",", ""), "solution": solution}
    return {**fields, "prompt": row.text("question"), "completion": solution}


def math(row: FormatRow, chat: bool) -> Row:
    """The answer is the column of that name, or else the last \\boxed{} of the solution."""
    given = row.row.get("answer")
    if isinstance(given, bool) or not isinstance(given, (str, int, float, type(None))):
        row.fail(f"column 'answer' must be text or a number, not {shortened(given)}")
    answer = last_boxed(row.text("solution")) if given is None or given == "" else given
    if answer is None:
        row.fail("column 'solution' has no \\boxed{} answer, and there is no column 'answer'")
    return _solved(row, "problem", answer)


def deepscaler(row: FormatRow, chat: bool) -> Row:
    """Problem, answer and a solution that may be empty."""
    return _solved(row, "problem", row.text("answer"))


def dapo(row: FormatRow, chat: bool) -> Row:
    """verl's rows: the prompt as messages (or text), the answer in reward_model.ground_truth."""
    reward = row.within(row.object("reward_model"), "reward_model")
    if reward.row.get("ground_truth") is None:
        reward.fail("there is no 'ground_truth'")
    fields = {**row.rest("prompt", "reward_model"), "answer": reward.row["ground_truth"]}
    if isinstance(row.row.get("prompt"), str):
        return {**fields, "prompt": row.text("prompt")}
    return {**fields, "messages": checked_messages(row.list("prompt"), row.label, "prompt")}


def ultrafeedback(row: FormatRow, chat: bool) -> Row:
    """Binarized: two conversations with scores. Original: an instruction with completions and their overall scores."""
    if "completions" not in row.row:
        return compared(row, chat)
    texts, scores = [], []
    for number, value in enumerate(row.list("completions")):
        completion = row.within(value, f"completions[{number}]")
        texts.append(completion.text("response"))
        scores.append(completion.row.get("overall_score"))
        if isinstance(scores[-1], bool) or not isinstance(scores[-1], (int, float)):
            completion.fail(f"'overall_score' must be a number, not {scores[-1]!r}")
    return {
        **row.rest("instruction", "completions"),
        "query": row.text("instruction"),
        "response": texts,
        "score": scores,
    }


def compared(row: FormatRow, chat: bool) -> Row:
    """Two whole conversations, 'chosen' and 'rejected', each with its prompt."""
    sides = {side: checked_messages(row.list(side), row.label, side) for side in ("chosen", "rejected")}
    return {**row.rest("prompt", "messages"), **sides}


def hh_rlhf(row: FormatRow, chat: bool) -> Row:
    """Two transcripts with turns "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    sides = {side: transcript(row, side) for side in ("chosen", "rejected")}
    if chat:
        return {**row.rest(), **sides}
    texts = {side: row.text(side) for side in sides}
    start = len(_common_start(*texts.values()))
    begin = texts["chosen"].rfind("\n\nAssistant:", 0, start) + len("\n\nAssistant:")
    if begin > start or "\n\nAssistant:" not in texts["chosen"][:start]:
        row.fail("'chosen' and 'rejected' differ before the first answer")
    if any(TURN.search(text, begin) for text in texts.values()):
        row.fail("'chosen' and 'rejected' differ before the last answer")
    return {**row.rest(), "prompt": texts["chosen"][:begin], **{side: text[begin:] for side, text in texts.items()}}


def transcript(row: FormatRow, column: str) -> list[Row]:
    """The turns of a transcript as messages."""
    parts = TURN.split(row.text(column))
    if parts[0].strip() or len(parts) < 3:
        row.fail(f"column {column!r} must begin with '\\n\\nHuman:' and have a turn '\\n\\nAssistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": text.strip()}
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def conversation(row: FormatRow, chat: bool) -> Row:
    """Messages as they are."""
    return {**row.rest("prompt"), "messages": checked_messages(row.list("messages"), row.label)}


def verifiable(row: FormatRow, chat: bool) -> Row:
    """Tulu 3's prompts for RL: messages with a ground truth."""
    fields = {**conversation(row, chat), "answer": row.text("ground_truth")}
    return {name: value for name, value in fields.items() if name != "ground_truth"}


def alpaca(row: FormatRow, chat: bool) -> Row:
    """An instruction, with an input or without, and its output; 'system' and 'history' as LLaMA-Factory has them."""
    instruction, more = row.text("instruction"), row.optional_text("input")
    more = more if more.strip() else ""
    fields = row.rest("instruction", "input", "output", "text", "history", "system")
    history = [] if parsed(row.row.get("history")) in (None, "", []) else row.list("history")
    if not chat:
        for column, given in (("system", row.row.get("system")), ("history", history)):
            if given:
                row.fail(f"column {column!r} is for models with a chat template")
        prompt = ALPACA[bool(more)].format_map({"instruction": instruction, "input": more})
        return {**fields, "prompt": prompt, "completion": row.text("output")}
    system = row.optional_text("system")
    messages = [{"role": "system", "content": system}] if system else []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            row.fail(f"history[{number}] must be a list of a question and an answer")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    messages.append({"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction})
    return {**fields, "messages": [*messages, {"role": "assistant", "content": row.text("output")}]}


def chatlearn(row: FormatRow, chat: bool) -> Row:
    """ChatLearn's: 'query' or 'prompt'; 'response' as text, or as a list with a list 'score'."""
    column = "query" if "query" in row.row else "prompt"
    fields, prompt, response = (
        row.rest("query", "prompt", "response", "score"),
        row.text(column),
        row.row.get("response"),
    )
    if isinstance(response, list):
        scores = row.list("score")
        if len(scores) != len(response):
            row.fail(f"'response' has {len(response)} items and 'score' has {len(scores)}")
        return {**fields, "query": prompt, "response": response, "score": scores}
    return {**fields, "prompt": prompt, **({} if response is None else {"completion": row.text("response")})}


_PAIR = "'chosen' and 'rejected', each a list of messages with the prompt in it"
FORMATS = {
    "gsm8k": Format(gsm8k, "'question' and 'answer' as texts, the answer ending with #### 42", ANSWERED, "openai/gsm8k"),
    "math": Format(
        math, "'problem' and 'solution' as texts with \\boxed{}, or 'answer'", ANSWERED,
        "hendrycks/competition_math, HuggingFaceH4/MATH-500",
    ),
    "deepscaler": Format(
        deepscaler, "'problem', 'answer' and 'solution' as texts", ANSWERED, "agentica-org/DeepScaleR-Preview-Dataset"
    ),
    "dapo_17k": Format(
        dapo, "'prompt' as messages and 'reward_model' with 'ground_truth'", ("prompts",), "BytedTsinghua-SIA/DAPO-Math-17k"
    ),
    "verl": Format(dapo, "'prompt' as messages and 'reward_model' with 'ground_truth'", ("prompts",), "parquet files for verl"),
    "ultrafeedback": Format(
        ultrafeedback, f"{_PAIR}, or 'instruction' and 'completions' with 'response' and 'overall_score'", COMPARED,
        "HuggingFaceH4/ultrafeedback_binarized, trl-lib/ultrafeedback_binarized, openbmb/UltraFeedback",
    ),
    "hh_rlhf": Format(
        hh_rlhf, "'chosen' and 'rejected' as texts of turns '\\n\\nHuman:' and '\\n\\nAssistant:'", COMPARED, "Anthropic/hh-rlhf"
    ),
    "tulu3_sft": Format(conversation, "'messages'", ANSWERED, "allenai/tulu-3-sft-mixture"),
    "tulu3_preference": Format(
        compared, _PAIR, COMPARED, "allenai/llama-3.1-tulu-3-8b-preference-mixture"
    ),
    "tulu3_rlvr": Format(
        verifiable, "'messages' and 'ground_truth' as text", ("prompts",), "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"
    ),
    "sharegpt": Format(
        sharegpt, "'conversations' of objects with 'from' (human, gpt, system, tool ...) and 'value'", ANSWERED,
        "ShareGPT, Vicuna, OpenHermes, LLaMA-Factory's",
    ),
    "alpaca": Format(
        alpaca, "'instruction', 'input' and 'output' as texts", ANSWERED, "tatsu-lab/alpaca, yahma/alpaca-cleaned"
    ),
    "anthropic": Format(
        anthropic, "'messages' whose contents are text or blocks, 'system' and 'tools' beside them", ANSWERED,
        "Anthropic's Messages API",
    ),
    "openai": Format(
        openai, "'messages' (with 'tools'), or 'input', 'preferred_output' and 'non_preferred_output'", COMPARED,
        "OpenAI's fine-tuning files",
    ),
    "chatlearn": Format(
        chatlearn, "'query' (or 'prompt') as text, 'response' as text, or 'response' and 'score' as lists", COMPARED,
        "ChatLearn's",
    ),
}  # fmt: skip
"""data.format -> its schema."""


def converted(row: Row, label: str, name: str, kind: str, chat: bool) -> Row:
    """A row of a named format as a row of data.kind.

    Args:
        chat: texts become turns of a conversation.

    Raises:
        ValueError: a column that is missing or of another type, or a row without what `kind` needs; names file and line.
    """
    known = FORMATS[name]
    return row_of_kind(known.convert(FormatRow(row, label, name, known.schema), chat), label, kind, chat, known.schema)


def row_of_kind(row: Row, label: str, kind: str, chat: bool, schema: str) -> Row:
    """What data.kind needs of a row that may hold more.

    Raises:
        ValueError: it does not have it.
    """
    pair = "chosen" in row or isinstance(row.get("response"), list)
    if kind in ("preferences", "feedback"):
        if not pair:
            raise ValueError(f"{label}: data.kind={kind} needs two answers to a prompt, and the row has one: {schema}.")
        return with_turns(row) if chat else row
    if pair:
        row = _best_answer(row, label)
    if kind == "prompts":
        row = _without_answer(row, label)
    elif "messages" not in row and "completion" not in row:
        raise ValueError(f"{label}: data.kind=demonstrations needs an answer, and the row has none: {schema}.")
    return with_turns(row, as_messages=kind == "prompts") if chat else row


def with_turns(row: Row, as_messages: bool = False) -> Row:
    """Texts of prompts and answers as turns of a user and an assistant.

    Args:
        as_messages: a prompt becomes 'messages' (data.kind=prompts).
    """
    prompt = row.get("prompt", row.get("query"))
    if not isinstance(prompt, str):
        return row
    turns = [{"role": "user", "content": prompt}]
    if as_messages:
        return {**_without(row, "prompt"), "messages": turns}

    def answer(text: Any) -> Any:
        return [{"role": "assistant", "content": text}] if isinstance(text, str) else text

    changed: Row = {key: answer(row[key]) for key in ("completion", "chosen", "rejected") if key in row}
    if isinstance(row.get("response"), list):
        changed["response"] = [answer(text) for text in row["response"]]
    return {**row, "query" if "query" in row else "prompt": turns, **changed}


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox{...}, as in some of MATH's solutions) holds, with its braces balanced; None if
    there is none."""
    boxes = list(BOXED.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :].lstrip()
    if rest[:1] != "{":  # \boxed 7
        return rest.split("$")[0].strip() or None
    depth = 0
    for match in BRACE.finditer(rest):
        depth += (match[0] == "{") - (match[0] == "}")
        if not depth:
            return rest[1 : match.start()].strip() or None
    return None


def _solved(row: FormatRow, prompt: str, answer: Any) -> Row:
    solution = row.optional_text("solution")
    fields = {**row.rest(prompt, "answer", "solution"), "answer": answer, "prompt": row.text(prompt)}
    return fields | ({"solution": solution, "completion": solution} if solution else {})


def _best_answer(row: Row, label: str) -> Row:
    """The prompt with its better answer."""
    if "response" in row:
        best = max(range(len(row["response"])), key=lambda place: row["score"][place])
        return {
            **_without(row, "query", "response", "score"),
            "prompt": row["query"],
            "completion": row["response"][best],
        }
    if isinstance(row["chosen"], str):
        return {**_without(row, "chosen", "rejected"), "completion": row["chosen"]}
    before = checked_messages(row["prompt"], label, "prompt") if "prompt" in row else []
    return {**_without(row, "prompt", "chosen", "rejected"), "messages": [*before, *row["chosen"]]}


def _without_answer(row: Row, label: str) -> Row:
    """The prompt alone: of a conversation all before its last assistant turns."""
    if "messages" not in row:
        return _without(row, "completion")
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{label}: 'messages' has only assistant turns, so there is no prompt.")
    return {**row, "messages": messages}


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _common_start(left: str, right: str) -> str:
    length = next(
        (k for k, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )
    return left[:length]
