"""Chat templates that behave as those of well-known families do, each turn of an assistant marked as transformers marks
it, with `{% generation %}`: the reference for what is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass

# A newline after a block is no part of the text (trim_blocks): those after E stand in braces.
G, E = "{% generation %}", "{% endgeneration %}"
SPECIAL = (
    "<s>", "</s>", "<|begin|>", "<|eot|>", "<|head|>", "<|/head|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|U|>", "<|A|>",
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A template, and which conversations it takes."""

    marked: str
    end: str = "</s>"
    """The tokenizer's end token."""
    begin: str = "<s>"
    system: bool = True
    alternates: bool = False
    """User and assistant in turn: others are refused."""
    tools: bool = False
    text_arguments: bool = False
    """Takes the arguments of tool calls as JSON text."""
    closes: bool = True
    """Ends an assistant's turn with a special token."""
    rewrites: bool = False
    """Writes a turn otherwise once more follow."""

    @property
    def plain(self) -> str:
        return re.sub(r"{% (end)?generation %}", "", self.marked)


ASK = "{% if add_generation_prompt %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
FOLD = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    + G + "{{ m.content }}<|im_end|>" + E + "{{ '\n' }}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
LLAMA2 = (
    FOLD + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]"
    "{% else %}" + G + " {{ m.content.strip() }} {{ eos_token }}" + E + "{% endif %}{% endfor %}"
)  # fmt: skip
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{% if m.role == 'assistant' %}"
    + G + "{{ m.content | trim }}<|eot|>" + E + "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    + ASK + "<|head|>assistant<|/head|>\n\n{% endif %}"
)  # fmt: skip
MISTRAL = (
    FOLD + ALTERNATE + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %}"
    + G + "{{ m.content }}{{ eos_token }}" + E + "{% endif %}{% endfor %}"
)  # fmt: skip
MOVES_SYSTEM = "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
MISTRAL_LAST = MISTRAL.replace("{{ bos_token }}", "{{ bos_token }}" + MOVES_SYSTEM).replace(
    "loop.first", "loop.index0 == ns.last"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ALTERNATE
    + "{% for m in messages %}<start_of_turn>{% if m.role == 'assistant' %}model\n" + G
    + "{{ m.content | trim }}<end_of_turn>" + E + "{{ '\n' }}{% else %}{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endif %}{% endfor %}" + ASK + "<start_of_turn>model\n{% endif %}"
)  # fmt: skip
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}" + G + "{{ m.content }}<|end|>" + E
    + "{{ '\n' }}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + ASK + "<|assistant|>\n"
    "{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
ZEPHYR = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n" + G + "{{ m.content }}{{ eos_token }}" + E
    + "{{ '\n' }}{% else %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)  # fmt: skip
VICUNA = (
    FOLD + "{{ system or 'A chat between a user and an assistant.' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %} ASSISTANT:" + G + " {{ m.content }}{{ eos_token }}" + E
    + "{% else %} USER: {{ m.content }}{% endif %}{% endfor %}" + ASK + " ASSISTANT:{% endif %}"
)  # fmt: skip
INSTRUCTION = (
    FOLD + "{{ system }}{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n" + G
    + "{{ m.content }}\n\n" + E + "{% else %}### Instruction:\n{{ m.content }}\n\n{% endif %}{% endfor %}" + ASK
    + "### Response:\n{% endif %}"
)  # fmt: skip
OPENS_THOUGHT = (
    FOLD + "{{ bos_token }}{{ system }}{% for m in messages %}{% if m.role == 'assistant' %}<|A|>" + G
    + "{{ m.content.split('</think>')[-1] }}{{ eos_token }}" + E + "{% else %}<|U|>{{ m.content }}{% endif %}"
    "{% endfor %}" + ASK + "<|A|><think>\n{% endif %}"
)  # fmt: skip
FORGETS_THOUGHT = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content or '' %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n" + G
    + "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>" + E + "{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
    + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)  # fmt: skip
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n" + G + "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>" + E + "{{ '\n' }}{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + ASK + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
JOINS_ARGUMENTS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|A|>" + G + "{% if m.content is string %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name + ': ' + c.function.arguments + ';' }}{% endfor %}{{ eos_token }}" + E
    + "{% else %}<|U|>{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}" + ASK + "<|A|>{% endif %}"
)  # fmt: skip
DATED = (
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday is {{ strftime_now('%d %b %Y') }}.\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
    "{% else %}You are helpful.{% endif %}<|eot|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n"
    "{% if m.role == 'assistant' %}" + G + "{{ m.content }}<|eot|>" + E + "{% else %}{{ m.content }}<|eot|>{% endif %}"
    "{% endfor %}" + ASK + "<|head|>assistant<|/head|>\n{% endif %}"
)  # fmt: skip

TEMPLATES = {
    "chatml": Template(CHATML, "<|im_end|>"),
    "llama2": Template(LLAMA2, alternates=True),
    "headers": Template(HEADERS, "<|eot|>", "<|begin|>"),
    "mistral": Template(MISTRAL, alternates=True),
    "mistral_moves_system": Template(MISTRAL_LAST, alternates=True, rewrites=True),
    "gemma": Template(GEMMA, "<end_of_turn>", "<|begin|>", system=False, alternates=True),
    "phi_ends_conversations": Template(PHI, "</s>"),
    "zephyr": Template(ZEPHYR),
    "vicuna": Template(VICUNA),
    "instruction": Template(INSTRUCTION, closes=False),
    "opens_thought": Template(OPENS_THOUGHT),
    "forgets_thought": Template(FORGETS_THOUGHT, "<|im_end|>", rewrites=True),
    "tools": Template(TOOLS, "<|im_end|>", tools=True),
    "joins_arguments": Template(JOINS_ARGUMENTS, tools=True, text_arguments=True),
    "dated": Template(DATED, "<|eot|>", "<|begin|>"),
}
