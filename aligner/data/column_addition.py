"""The default task: add two numbers, directly or in columns; its rows, its tokenizer, and a small model to learn it.

Most demonstrations answer at once, which is hard for the model, the others in columns, which is easy; reinforcement
finds that columns pay.
`python -m aligner.data.column_addition --out DIR` writes DIR/model and a file of rows of each kind.
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
from aligner.data.jsonl import LabelledRow
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
    """Which additions, and how many rows of each kind. What is demonstrated is also compared in preferences; otherwise
    no addition is in two kinds."""

    digits: int = 3
    """Digits of both terms."""
    demonstrations: int = 60_000
    """Rows with a completion."""
    demonstrated: int = 1_500
    """Different additions among them: enough to learn to work in columns, too few to learn direct answers by more than
    heart."""
    prompts: int = 16_384
    """Rows to generate from in training."""
    heldout: int = 512
    """Rows to generate from in evaluation."""
    direct_fraction: float = 0.6
    """Share of demonstrations that answer at once; the others work in columns."""
    preferences: int = 16_384
    """Pairs of a right and a wrong answer to demonstrated additions."""
    preferred_direct_fraction: float = 0.1
    """Share of direct answers in pairs, among right and wrong ones alike. Whether one is right must be known by heart,
    so more is harder; columns can be checked."""
    malformed_fraction: float = 0.2
    """Share of wrong answers from which no number can be read, which is easy to see; the others give a wrong number."""
    wrong_digits: int = 3
    """Mistaken digits or columns in a wrong answer, where it has as many; fewer is harder."""
    seed: int = 0
    """Decides which additions fall into which kind, and their order."""

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} must be 1 or more.")
        for name in ("direct_fraction", "preferred_direct_fraction", "malformed_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        for name in ("demonstrations", "demonstrated", "prompts", "heldout", "preferences", "wrong_digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        wanted, there_are = self.demonstrated + self.prompts + self.heldout, len(self._terms) ** 2
        if wanted > there_are:
            raise ValueError(
                f"demonstrated={self.demonstrated}, prompts={self.prompts} and heldout={self.heldout} want "
                f"{wanted} different additions, but digits={self.digits} has {there_are}; lower them or raise digits."
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
        """Different additions, in random order."""
        terms = self._terms
        places = random.Random(f"{self.seed}/{purpose}").sample(range(len(terms) ** 2), count)
        return [(terms[place // len(terms)], terms[place % len(terms)]) for place in places]

    def heldout_rows(self) -> list[LabelledRow]:
        """{'prompt', 'answer'} for evaluation; the sizes of the training sets do not change them."""
        return _labelled("heldout", map(_prompt_row, self._heldout_additions()))

    def prompt_rows(self) -> list[LabelledRow]:
        """{'prompt', 'answer'} for training by reinforcement."""
        return _labelled("prompts", map(_prompt_row, self._training_additions()[: self.prompts]))

    def demonstration_rows(self) -> list[LabelledRow]:
        """{'prompt', 'completion', 'answer'}, `direct_fraction` of them direct, mixed."""
        pool = self._training_additions()[self.prompts :]
        additions = [pool[row % len(pool)] for row in range(self.demonstrations)]
        return _labelled("demonstrations", self._demonstrated(additions, "styles"))

    def heldout_demonstration_rows(self) -> list[LabelledRow]:
        """The same on the held-out additions, one for each."""
        return _labelled("heldout_demonstrations", self._demonstrated(self._heldout_additions(), "heldout styles"))

    def _demonstrated(self, additions: list[Addition], purpose: str) -> Iterator[dict[str, Any]]:
        direct = round(self.direct_fraction * len(additions))
        styles = [direct_answer] * direct + [column_answer] * (len(additions) - direct)
        random.Random(f"{self.seed}/{purpose}").shuffle(styles)
        for terms, style in zip(additions, styles, strict=True):
            yield {**_prompt_row(terms), "completion": style(*terms)}

    def preference_rows(self) -> list[LabelledRow]:
        """{'prompt', 'chosen', 'rejected', 'answer'} on demonstrated additions: a right answer and a wrong one, each
        direct or in columns whatever the other is."""
        pool = self._training_additions()[self.prompts :]
        additions = [pool[row % len(pool)] for row in range(self.preferences)]
        return _labelled("preferences", self._compared(additions, random.Random(f"{self.seed}/preferences")))

    def heldout_preference_rows(self) -> list[LabelledRow]:
        """The same on the held-out additions, one pair for each."""
        chance = random.Random(f"{self.seed}/heldout preferences")
        return _labelled("heldout_preferences", self._compared(self._heldout_additions(), chance))

    def feedback_rows(self) -> list[LabelledRow]:
        """{'prompt', 'completion', 'label', 'answer'}: the pairs taken apart, in random order."""
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
        """Malformed; or with a mistake in the final number; or in the columns, which the final number follows."""
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
    """A character tokenizer of 128 entries as a Hugging Face folder: tokenizer.json and tokenizer_config.json."""
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
    """Sizes of the small Qwen3 model: 657k parameters by default."""

    hidden: int = 128
    layers: int = 3
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    """At least 32: vLLM's attention on CPUs needs it."""
    ffn: int = 384
    """Width of the MLP."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.ffn) < 1:
            raise ValueError(f"every size of the model must be 1 or more: {self}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")


def write_model(folder: Path, shape: ModelShape, seed: int) -> None:
    """An untrained model with its tokenizer, float32, input and output embeddings tied, loadable by transformers."""
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
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for _, row in rows))


def write(out: Path, task: ColumnAddition, shape: ModelShape) -> list[str]:
    """The model folder and the data files; returns their names."""
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
    """The command: one option for each field of the task and of the model's shape."""
    parser = argparse.ArgumentParser(prog="python -m aligner.data.column_addition", description=__doc__)
    parser.add_argument("--out", type=path_option, required=True, help="folder to write into")
    task, shape = ColumnAddition(), ModelShape()
    for name, default in {**vars(task), **vars(shape)}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    given = vars(parser.parse_args(arguments))
    try:
        task = ColumnAddition(**{name: given[name] for name in vars(task)})
        shape = ModelShape(**{name: given[name] for name in vars(shape)})
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {given['out']}/: {', '.join(write(given['out'], task, shape))}")


if __name__ == "__main__":
    main()
