"""Chat templates of model families as TRL ships them, with tokenizers trained here that have the families' special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizer_kinds import KINDS

FOLDER = Path(trl.__file__).parent / "chat_templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
COHERE = ("<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
MISTRAL = (
    "{{ bos_token }}{% set user = messages | selectattr('role', 'equalto', 'user') | list | length %}"
    "{% set ns = namespace(seen=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}"
    "{% if tools and ns.seen == user %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if (c.id or '') | length != 9 %}{{ raise_exception('ids of 9 characters') }}{% endif %}"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {"
    '"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% endif %}{% endfor %}'
)
"""As Mistral 7B v0.3's: the tools stand before the last user turn, and move with it."""


@dataclass(frozen=True)
class Family:
    """A template and the tokens that it uses."""

    template: str
    """File of TRL without its ending, or the template itself."""
    special: tuple[str, ...]
    end: str
    """The tokenizer's end token."""
    stops: tuple[str, ...] = ()
    """Further stop tokens, as generation_config.json names them."""
    tools: bool = False
    keeps: bool = True
    """The turns so far are written the same once others follow, in a conversation of plain answers."""
    begin: str | None = None

    @property
    def source(self) -> str:
        file = FOLDER / f"{self.template}.jinja"
        return file.read_text(encoding="utf-8") if len(self.template) < 60 else self.template


FAMILIES = {
    "qwen2.5": Family("qwen2_5", CHATML + THINKS[2:4], "<|im_end|>", ("<|endoftext|>",), tools=True),
    "qwen3": Family("qwen3", CHATML + THINKS, "<|im_end|>", ("<|endoftext|>",), tools=True),
    "qwen3-2507": Family("qwen3_instruct_2507", CHATML + THINKS, "<|im_end|>", ("<|endoftext|>",), tools=True),
    "qwen3.5-think": Family("qwen3_5_think", CHATML + THINKS, "<|im_end|>", ("<|endoftext|>",), tools=True, keeps=False),
    "qwen3.6": Family("qwen3_6", CHATML + THINKS, "<|im_end|>", ("<|endoftext|>",), tools=True, keeps=False),
    "llama3": Family("llama3", HEADERS, "<|eot_id|>", begin="<|begin_of_text|>"),
    "llama3.1": Family("llama3_1", HEADERS, "<|eot_id|>", ("<|eom_id|>",), tools=True, begin="<|begin_of_text|>"),
    "llama3.2": Family("llama3_2", HEADERS, "<|eot_id|>", ("<|eom_id|>",), tools=True, begin="<|begin_of_text|>"),
    "gpt-oss": Family("gptoss", HARMONY, "<|return|>", ("<|call|>",), tools=True),
    "glm4.5": Family(
        "glm4moe", ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", *THINKS),
        "<|endoftext|>", ("<|user|>", "<|observation|>"), tools=True,
    ),
    "phi3": Family("phi3", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", ("<|end|>",)),
    "phi3.5": Family("phi3_5", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", ("<|end|>",)),
    "gemma": Family("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", ("<end_of_turn>",), begin="<bos>"),
    "gemma3": Family("gemma3", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", ("<end_of_turn>",), begin="<bos>"),
    "deepseek-r1": Family("deepseek_r1_distill", DEEPSEEK, DEEPSEEK[1], begin=DEEPSEEK[0], keeps=False),
    "deepseek-v3": Family("deepseekv3", DEEPSEEK, DEEPSEEK[1], begin=DEEPSEEK[0], keeps=False),
    "cohere": Family("cohere", ("<BOS_TOKEN>", *COHERE), "<|END_OF_TURN_TOKEN|>", begin="<BOS_TOKEN>"),
    "lfm2": Family("lfm2", (*CHATML, "<|tool_list_start|>", "<|tool_list_end|>"), "<|im_end|>", tools=True),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>", tools=True, begin="<s>",
    ),
}  # fmt: skip


@cache
def _trained(kind: str) -> str:
    return str(KINDS[kind]().to_str())


def tokenizer_of(family: Family, kind: str = "byte_level_split") -> PreTrainedTokenizerFast:
    """A tokenizer of that kind with the family's special tokens and template."""
    made = Tokenizer.from_str(_trained(kind))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=family.begin,
        eos_token=family.end,
        pad_token=family.end,
        chat_template=family.source,
    )


def stop_ids(tokenizer: PreTrainedTokenizerFast, family: Family) -> list[int]:
    """Ids at which generation stops."""
    ids = tokenizer.convert_tokens_to_ids([family.end, *family.stops])
    assert isinstance(ids, list)
    return ids
