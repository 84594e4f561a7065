"""The built-in toy task: adding two numbers, answered directly or in columns; rows, tokenizer, and a small model for it.

Most demonstrations answer directly, which is hard for the model, the others in columns, which is easy; RL discovers that
columns are rewarded more often.
`python -m aligner.data.column_addition --out DIR` writes DIR/model and one JSONL file per kind of row.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.data.column_answers import column_answer, direct_answer, malformed, wrong_columns, wrong_number
from aligner.data.sources.source import LabelledRow
from aligner.paths import path_option

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = 128
MAX_POSITIONS = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

Addition = tuple[int, int]


@dataclass(frozen=True)
class ColumnAddition:
    """Settings of the task: number of rows of each kind. Demonstrations and preferences share their additions; otherwise no
    addition occurs in two kinds."""

    digits: int = 3
    """Number of digits of both terms."""
    demonstrations: int = 60_000
    """Number of rows with a completion (SFT)."""
    demonstrated: int = 1_500
    """Distinct additions among the demonstrations: enough to learn columns, too few for direct answers to generalise."""
    prompts: int = 16_384
    """Number of training prompts (RL)."""
    heldout: int = 512
    """Number of evaluation prompts."""
    direct_fraction: float = 0.6
    """Fraction of demonstrations that answer directly; the others use columns."""
    preferences: int = 16_384
    """Number of pairs of a right and a wrong answer to demonstrated additions."""
    preferred_direct_fraction: float = 0.1
    """Fraction of direct answers among right and wrong answers of pairs. A direct answer can only be judged by knowing the
    sum, so more of them is harder; columns can be checked."""
    malformed_fraction: float = 0.2
    """Fraction of wrong answers that contain no parsable number (easy to detect); the others give a wrong number."""
    wrong_digits: int = 3
    """Wrong digits or columns in a wrong answer, at most; fewer is harder."""
    seed: int = 0
    """Random seed of the split into kinds and of the order."""

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} must be 1 or more.")
        for name in ("direct_fraction", "preferred_direct_fraction", "malformed_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        for name in ("demonstrations", "demonstrated", "prompts", "heldout", "preferences", "wrong_digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        needed, available = self.demonstrated + self.prompts + self.heldout, len(self._terms) ** 2
        if needed > available:
            raise ValueError(
                f"demonstrated={self.demonstrated}, prompts={self.prompts} and heldout={self.heldout} need "
                f"{needed} distinct additions, but digits={self.digits} has {available}; lower them or raise digits."
            )

    @property
    def _terms(self) -> range:
        return range(10 ** (self.digits - 1) if self.digits > 1 else 0, 10**self.digits)

    def _heldout_additions(self) -> list[Addition]:
        return self._sample("heldout", self.heldout)

    def _training_additions(self) -> list[Addition]:
        heldout = set(self._heldout_additions())
        drawn = self._sample("training", self.demonstrated + self.prompts + self.heldout)
        return [addition for addition in drawn if addition not in heldout][: self.prompts + self.demonstrated]

    def _sample(self, purpose: str, count: int) -> list[Addition]:
        """Distinct additions, in random order."""
        terms = self._terms
        places = random.Random(f"{self.seed}/{purpose}").sample(range(len(terms) ** 2), count)
        return [(terms[place // len(terms)], terms[place % len(terms)]) for place in places]

    def heldout_rows(self) -> list[LabelledRow]:
        """{'prompt', 'answer'} for evaluation; independent of the sizes of the training sets."""
        return _labelled("heldout", map(_prompt_row, self._heldout_additions()))

    def prompt_rows(self) -> list[LabelledRow]:
        """{'prompt', 'answer'} for RL."""
        return _labelled("prompts", map(_prompt_row, self._training_additions()[: self.prompts]))

    def demonstration_rows(self) -> list[LabelledRow]:
        """{'prompt', 'completion', 'answer'} for SFT, `direct_fraction` of them direct, shuffled."""
        pool = self._training_additions()[self.prompts :]
        additions = [pool[row % len(pool)] for row in range(self.demonstrations)]
        return _labelled("demonstrations", self._demonstrated(additions, "styles"))

    def heldout_demonstration_rows(self) -> list[LabelledRow]:
        """Demonstrations of the held-out additions, one each."""
        return _labelled("heldout_demonstrations", self._demonstrated(self._heldout_additions(), "heldout styles"))

    def _demonstrated(self, additions: list[Addition], purpose: str) -> Iterator[dict[str, Any]]:
        direct = round(self.direct_fraction * len(additions))
        styles = [direct_answer] * direct + [column_answer] * (len(additions) - direct)
        random.Random(f"{self.seed}/{purpose}").shuffle(styles)
        for terms, style in zip(additions, styles, strict=True):
            yield {**_prompt_row(terms), "completion": style(*terms)}

    def preference_rows(self) -> list[LabelledRow]:
        """{'prompt', 'chosen', 'rejected', 'answer'} on demonstrated additions: a right and a wrong answer, each
        independently direct or in columns."""
        pool = self._training_additions()[self.prompts :]
        additions = [pool[row % len(pool)] for row in range(self.preferences)]
        return _labelled("preferences", self._compared(additions, random.Random(f"{self.seed}/preferences")))

    def heldout_preference_rows(self) -> list[LabelledRow]:
        """Pairs on the held-out additions, one each."""
        chance = random.Random(f"{self.seed}/heldout preferences")
        return _labelled("heldout_preferences", self._compared(self._heldout_additions(), chance))

    def feedback_rows(self) -> list[LabelledRow]:
        """{'prompt', 'completion', 'label', 'answer'}: the pairs as single rows, shuffled."""
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "answer": row["answer"]}
            for _, row in self.preference_rows()
            for side in ("chosen", "rejected")
        ]
        random.Random(f"{self.seed}/feedback").shuffle(rows)
        return _labelled("feedback", rows)

    def _compared(self, additions: Iterable[Addition], chance: random.Random) -> Iterator[dict[str, Any]]:
        for terms in additions:
            right = self._style(chance)(*terms)
            yield {**_prompt_row(terms), "chosen": right, "rejected": self._wrong_answer(terms, chance)}

    def _style(self, chance: random.Random) -> Callable[[int, int], str]:
        return direct_answer if chance.random() < self.preferred_direct_fraction else column_answer

    def _wrong_answer(self, terms: Addition, chance: random.Random) -> str:
        """A malformed answer, a wrong final number, or wrong columns with the final number that they imply."""
        style = self._style(chance)
        if chance.random() < self.malformed_fraction:
            return malformed(style(*terms), chance)
        if style is direct_answer or chance.random() < 0.5:
            return wrong_number(style(*terms), self.wrong_digits, chance)
        return wrong_columns(*terms, self.wrong_digits, chance)


def _prompt_row(terms: Addition) -> dict[str, Any]:
    left, right = terms
    return {"prompt": f"{BOS}{left}+{right}=", "answer": str(left + right)}


def _labelled(kind: str, rows: Iterable[dict[str, Any]]) -> list[LabelledRow]:
    return [(f"column_addition.{kind}:{number}", row) for number, row in enumerate(rows, start=1)]


def write_tokenizer(folder: Path) -> None:
    """Write a character tokenizer with 128 entries in Hugging Face format: tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = (PAD, BOS, EOS, UNKNOWN)
    entries = [*special, *CHARACTERS]
    entries += [f"<unused{i}>" for i in range(len(entries), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel(vocab={entry: i for i, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the small Qwen3 model; the default has 657k parameters."""

    hidden: int = 128
    layers: int = 3
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    """At least 32, as vLLM's CPU attention requires."""
    ffn: int = 384
    """Width of the MLP."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.ffn) < 1:
            raise ValueError(f"every size of the model must be 1 or more: {self}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")


def write_model(folder: Path, shape: ModelShape, seed: int) -> None:
    """Write an untrained model (float32, tied embeddings) with its tokenizer, loadable by transformers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_rows(path: Path, rows: Iterable[LabelledRow]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for _, row in rows))


def write_task(out: Path, task: ColumnAddition, shape: ModelShape) -> list[str]:
    """Write the model folder and the data files; returns their names."""
    write_model(out / "model", shape, task.seed)
    files = {
        "demonstrations": task.demonstration_rows(),
        "prompts": task.prompt_rows(),
        "heldout": task.heldout_rows(),
        "heldout_demonstrations": task.heldout_demonstration_rows(),
        "preferences": task.preference_rows(),
        "heldout_preferences": task.heldout_preference_rows(),
        "feedback": task.feedback_rows(),
    }
    for name, rows in files.items():
        write_rows(out / f"{name}.jsonl", rows)
    return ["model", *(f"{name}.jsonl" for name in files)]


def main(arguments: list[str] | None = None) -> None:
    """Command line: one option per field of `ColumnAddition` and `ModelShape`."""
    parser = argparse.ArgumentParser(prog="python -m aligner.data.column_addition", description=__doc__)
    parser.add_argument("--out", type=path_option, required=True, help="folder to write into")
    task, shape = ColumnAddition(), ModelShape()
    for name, default in {**vars(task), **vars(shape)}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    options = vars(parser.parse_args(arguments))
    try:
        task = ColumnAddition(**{name: options[name] for name in vars(task)})
        shape = ModelShape(**{name: options[name] for name in vars(shape)})
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {options['out']}/: {', '.join(write_task(options['out'], task, shape))}")


if __name__ == "__main__":
    main()
