"""Which tokens end a turn: what the model's files, its tokenizer, its chat template and the trained answers say of it.

A base model's files often name <|endoftext|> while its chat template closes turns with <|im_end|>: trained on that,
the model never writes what generation waits for. So all sources count, as they do in vLLM for the first three.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from aligner.data.answers import Answered

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE, ANSWERS = "the tokenizer", "the chat template", "the trained answers"
SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
QUESTION = "Which one do you mean?"
PROBES = ("The seventh, I believe", "Some blue or green bo")
"""Answers of which neither begins nor ends as the other does."""


@dataclass(frozen=True)
class TemplateEnd:
    """How a chat template closes an assistant's turn."""

    token: int | None = None
    """The special token that it writes after the answer."""
    text: str = ""
    """What it writes instead where it closes turns with plain text, which no stop token can stand for."""


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a turn, by who says so."""

    sources: Mapping[str, tuple[int, ...]]
    """Source, such as "generation_config.json" -> token ids; in the order in which they were asked."""
    names: Mapping[int, str | None] = field(default_factory=dict)
    """Token id -> its text; None where the tokenizer has no such token."""
    text: str = ""
    """Plain text that the chat template closes turns with."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Every one of them, each once: generation stops at each."""
        return tuple(dict.fromkeys(token for ids in self.sources.values() for token in ids))

    @property
    def disagreement(self) -> str | None:
        """One line that names each source, where one ends turns with a token that the model's own files lack."""
        said = self.sources.get(GENERATION, self.sources.get(CONFIG, ()))
        strange = [token for token in self.ids if self.names.get(token, "") is None]
        parts = []
        if strange or not set(self.ids) <= set(said):
            told = (f"{source} {self.shown(ids) if ids else 'nothing'}" for source, ids in self.sources.items())
            parts.append(f"what ends a turn differs: {', '.join(told)}; generation stops at each, and exports name all")
        if self.text:
            parts.append(
                f"the chat template closes turns with the text {self.text!r}, which is no single special token: only "
                f"{self.shown(self.ids)} can end a response"
            )
        return "; ".join(parts) or None

    def shown(self, ids: Iterable[int]) -> str:
        """Tokens for people: their texts and ids."""
        names = {token: self.names.get(token) for token in ids}
        shown = (f"{name} ({token})" if name is not None else f"{token} (no token)" for token, name in names.items())
        return " and ".join(shown) or "nothing"


def find_ends(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, answers: Iterable[Answered] = (), whole: bool = False
) -> EndTokens:
    """Ask the model's files, the tokenizer, its chat template and the answers that are trained on.

    Args:
        folder: the model's.
        answers: their masks say where a trained turn ends.
        whole: they are trained on as a whole (data.train_on=all), other turns too.

    Raises:
        ValueError: config.json or generation_config.json names a token that the model does not have.
    """
    ids = special_ids(folder)
    sources = {file: found for (file, key), found in ids.items() if key == "eos_token_id"}
    if tokenizer.eos_token_id is not None:
        sources[TOKENIZER] = (tokenizer.eos_token_id,)
    closing = template_end(tokenizer)
    if closing.token is not None:
        sources[TEMPLATE] = (closing.token,)
    known = {token for found in sources.values() for token in found}
    trained = trained_ends(answers, tokenizer, known, whole)
    if trained:
        sources[ANSWERS] = trained
    names = {token: _name(tokenizer, token) for found in sources.values() for token in found}
    return EndTokens(sources, names, closing.text)


def special_ids(folder: str | Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """(file, key) -> the token ids that config.json and, where there is one, generation_config.json name.

    Raises:
        ValueError: one that is no id of a token of the model; file, key and what would work are named. A pad or begin
            token of -1 is an old way to say that there is none.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG)
    files = {CONFIG: config}
    if (folder / GENERATION).is_file():
        files[GENERATION] = _read(folder / GENERATION)
    vocab = config.get("vocab_size")
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    for file, values in files.items():
        for key in SPECIAL_IDS:
            value = values.get(key)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if key != "eos_token_id" and value == -1:
                listed = []
            for token in listed:
                _check_id(token, vocab, f"{folder / file}: {key}={json.dumps(value)}")
            found[file, key] = tuple(dict.fromkeys(listed))
    return found


def _check_id(token: Any, vocab: Any, said: str) -> None:
    if type(token) is not int or token < 0:
        raise ValueError(f"{said} is no token id; use a whole number from 0 on, a list of them, or null.")
    if type(vocab) is int and token >= vocab:
        raise ValueError(
            f"{said}, but the model's vocab_size is {vocab}, so its tokens are 0 to {vocab - 1}; set the id that the "
            "model was trained with, or null."
        )


def template_end(tokenizer: PreTrainedTokenizerBase) -> TemplateEnd:
    """What follows an assistant's answer in the chat template; nothing where there is no template, where it refuses
    every trial, or where it leaves turns open.

    Two conversations that differ in the answer alone are rendered: what they have in common at their ends comes after
    the answer, whatever the template makes of the answer itself. The first special token of that ends the turn.
    """
    return _template_end(tokenizer, repr(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _template_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TemplateEnd:
    form, rendered = _rendered(tokenizer)
    if form is None:
        return TemplateEnd()
    tail = _common_end(*rendered)
    special, never = _special(tokenizer), _never(tokenizer)
    following = [token for token in tokenizer.encode(tail, add_special_tokens=False) if token in special]
    token = following[0] if following else None
    if token is None:
        return TemplateEnd(text=tail.strip())
    if token in never or _begins_another(tokenizer, token, form, rendered):
        return TemplateEnd()
    return TemplateEnd(token)


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens after which a text is complete, as far as the tokenizer tells: its own end token and the template's."""
    found = (tokenizer.eos_token_id, template_end(tokenizer).token)
    return frozenset(token for token in found if token is not None)


def trained_ends(
    answers: Iterable[Answered], tokenizer: PreTrainedTokenizerBase, known: Iterable[int] = (), whole: bool = False
) -> tuple[int, ...]:
    """The special tokens that are the last of a trained turn, the most frequent first. One that stands inside answers
    too ends no turn, unless it is among those `known` to.

    Args:
        whole: every token is trained on, so that turns end inside too.
    """
    special = _special(tokenizer) - _never(tokenizer)
    known = frozenset(known)
    ends: Counter[int] = Counter()
    inside: set[int] = set()
    for answered in answers:
        for start, stop in _trained_turns(answered.mask):
            last = answered.tokens[stop - 1]
            if last in special:
                ends[last] += 1
            inside |= special.intersection(answered.tokens[start : stop - 1])
    return tuple(token for token, _ in ends.most_common() if whole or token in known or token not in inside)


def special_among(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, ...]:
    """Those of the ids that are special tokens, which stand for no text of an answer."""
    special = _special(tokenizer)
    return tuple(token for token in ids if token in special)


def _trained_turns(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of each run of trained tokens."""
    flags = bytes(mask)
    stop = 0
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield start, stop


def _rendered(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, list[str]]:
    """(number of the first form of conversation that the template takes, both trials in that form)."""
    for form in range(len(_forms(""))) if tokenizer.chat_template else ():
        found = [_render(tokenizer, _forms(answer)[form]) for answer in PROBES]
        if found[0] and found[1] and found[0] != found[1]:  # one that wants parts may drop plain text without a word
            return form, [found[0], found[1]]
    return None, []


def _forms(answer: str) -> list[list[dict[str, Any]]]:
    """A question and its answer in the forms that templates want; some insist on a system message, or on parts."""
    question: dict[str, Any] = {"role": "user", "content": QUESTION}
    answered: dict[str, Any] = {"role": "assistant", "content": answer}
    system: dict[str, Any] = {"role": "system", "content": "Be brief."}
    plain = [[question, answered], [system, question, answered]]
    return plain + [
        [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages] for messages in plain
    ]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception:  # templates refuse in any way they like; a real conversation will say why
        return None
    return text if isinstance(text, str) else None


def _begins_another(tokenizer: PreTrainedTokenizerBase, token: int, form: int, rendered: list[str]) -> bool:
    """Whether the token introduces a turn rather than ends this one: it stands before the answer as the last special
    token, and after it only where no other turn follows (a template that opens the next turn by itself)."""
    special = _special(tokenizer)
    before = _common_start(*rendered)
    header = [one for one in tokenizer.encode(before, add_special_tokens=False) if one in special]
    if header[-1:] != [token]:
        return False
    more = {**_forms("")[form][-2], "role": "user"}
    longer = [_render(tokenizer, [*_forms(answer)[form], more]) for answer in PROBES]
    if not longer[0] or not longer[1] or longer[0] == longer[1]:
        return False
    tail = tokenizer.encode(_common_end(longer[0], longer[1]), add_special_tokens=False)
    return next((one for one in tail if one in special), None) != token


def _common_start(one: str, other: str) -> str:
    return "".join(pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that no text is made of: special ones and others that were added whole; blanks among them are text."""
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    return frozenset(tokenizer.all_special_ids) | {token for token, text in added.items() if text.strip()}


def _never(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens that end nothing, whatever stands where."""
    others = ("bos_token_id", "unk_token_id", "mask_token_id", "cls_token_id")
    found = (getattr(tokenizer, name, None) for name in others)
    return frozenset(token for token in found if token is not None and token != tokenizer.eos_token_id)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str | None:
    if token >= len(tokenizer) and token not in tokenizer.added_tokens_decoder:
        return None
    name = tokenizer.convert_ids_to_tokens(token)
    return name if isinstance(name, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(found).__name__}.")
    return found


def generation_folder(folder: str | Path, ends: EndTokens, cache: Path) -> Path | None:
    """A folder for `vllm serve --generation-config`, whose generation_config.json is the model's own with every token
    that ends turns; None where vLLM stops at all of them by itself.

    Args:
        cache: where it is kept, named by its content.
    """
    file = Path(folder) / GENERATION
    found = _read(file) if file.is_file() else {}
    named = ends.sources.get(GENERATION, ends.sources[CONFIG])  # vLLM takes the latter where there is no such file
    if set(ends.ids) <= {*named, *ends.sources.get(TOKENIZER, ())}:  # it stops at the tokenizer's by itself
        return None
    text = json.dumps(found | {"eos_token_id": list(dict.fromkeys([*named, *ends.ids]))}, indent=2) + "\n"
    made = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    made.mkdir(parents=True, exist_ok=True)
    unnamed = made / f".{GENERATION}.{os.getpid()}"
    unnamed.write_text(text, encoding="utf-8")
    os.replace(unnamed, made / GENERATION)
    return made


def main(folder: str) -> None:
    """For launch/serve.sh: say what differs, and print the `generation_folder` where there is to be one. What cannot be
    read is said and left to the server: it may serve what cannot be trained."""
    from transformers import AutoTokenizer

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aligner" / "generation_config"
    try:
        ends = find_ends(folder, AutoTokenizer.from_pretrained(folder, local_files_only=True))
        made = generation_folder(folder, ends, cache)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        said = " ".join(str(error).split())
        print(f"serve.sh: what ends a turn is left to the server ({type(error).__name__}: {said})", file=sys.stderr)
        return
    if ends.disagreement:
        print(f"serve.sh: {ends.disagreement}", file=sys.stderr)
    if made:
        print(made)


if __name__ == "__main__":
    main(sys.argv[1])
