"""Two tools for sums of products, 37*4+58*6, and the task for them: a small model that has seen most of them answered at once,
which it cannot do, and some worked out with the tools.

`python docs/examples/calculator.py --out DIR` writes DIR/model, demonstrations.jsonl (SFT), prompts.jsonl and heldout.jsonl;
docs/agents.md trains on them. Environment processes import this file, so it imports nothing else at its head.
"""

import argparse
import json
import random
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for name, value in c.function.arguments.items() %}{{ name }}={{ value }}{{ ',' if not loop.last }}{% endfor %})"
    "{{ ',' if not loop.last }}{% endfor %}]{% endif %}{{ eos_token }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
"""Calls in Python's syntax (environment.tool_parser=pythonic); the tools themselves are known from the demonstrations."""


class Calculator:
    """Its public methods are the tools."""

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: One number.
            b: The other.
        """
        return a + b

    def mul(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: One number.
            b: The other.
        """
        return a * b


def task(chance: random.Random) -> tuple[int, int, int, int]:
    return chance.randint(11, 99), chance.randint(2, 9), chance.randint(11, 99), chance.randint(2, 9)


def demonstration(a: int, b: int, c: int, d: int, tools: bool) -> list[dict]:
    """The conversation, worked out with tools or answered at once."""
    messages = [{"role": "user", "content": f"{a}*{b}+{c}*{d}"}]
    steps = [("mul", a, b, a * b), ("mul", c, d, c * d), ("add", a * b, c * d, a * b + c * d)]
    for name, left, right, value in steps if tools else ():
        call = {"type": "function", "function": {"name": name, "arguments": {"a": left, "b": right}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": str(value)})
    return [*messages, {"role": "assistant", "content": str(a * b + c * d)}]


def write_task(out: Path, seed: int, demonstrations: int = 20_000, prompts: int = 4096, heldout: int = 512) -> None:
    """Tasks in random order, those of different files different; 6 of 10 demonstrations answer at once."""
    from aligner.data.column_addition import ModelShape, write_model

    chance = random.Random(seed)
    tasks = list({task(chance) for _ in range(2 * (demonstrations + prompts + heldout))})
    chance.shuffle(tasks)
    write_model(out / "model", ModelShape(), seed)
    settings = out / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": CHAT_TEMPLATE}, indent=2))
    shown, asked = tasks[:demonstrations], tasks[demonstrations : demonstrations + prompts]
    rows = [{"messages": demonstration(*one, tools=number % 10 >= 6)} for number, one in enumerate(shown)]
    (out / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in (("prompts", asked), ("heldout", tasks[-heldout:])):
        rows = [{"messages": (m := demonstration(*one, tools=False))[:1], "answer": m[-1]["content"]} for one in part]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_task(options.out, options.seed)
