"""Stop tokens: the end-of-turn tokens named by the model's files, its tokenizer, its chat template and the trained answers.

A base model's files often name <|endoftext|> while its chat template closes turns with <|im_end|>: trained on that, the
model never generates the token that generation stops at. So all sources are combined, as in vLLM for the first three.
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

    from aligner.data.tokenized_answer import TokenizedAnswer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE, ANSWERS = "the tokenizer", "the chat template", "the trained answers"
SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
QUESTION = "Which one do you mean?"
PROBES = ("The seventh, I believe", "Some blue or green bo")
"""Probe answers with no common prefix or suffix."""


@dataclass(frozen=True)
class TemplateEnd:
    """How a chat template closes an assistant turn."""

    token: int | None = None
    """Special token after the answer."""
    text: str = ""
    """Plain text that closes the turn instead, which no single stop token matches."""


@dataclass(frozen=True)
class EndTokens:
    """End-of-turn tokens by source."""

    sources: Mapping[str, tuple[int, ...]]
    """Source, such as "generation_config.json" -> token ids."""
    names: Mapping[int, str | None] = field(default_factory=dict)
    """Token id -> its text; None if the tokenizer has no such token."""
    text: str = ""
    """Plain text with which the chat template closes turns."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them without duplicates; generation stops at each."""
        return tuple(dict.fromkeys(token for ids in self.sources.values() for token in ids))

    @property
    def disagreement(self) -> str | None:
        """One line that lists the sources, if one of them names a token that the model's own files do not; else None."""
        model_ids = self.sources.get(GENERATION, self.sources.get(CONFIG, ()))
        unknown = [token for token in self.ids if self.names.get(token, "") is None]
        parts = []
        if unknown or not set(self.ids) <= set(model_ids):
            by_source = (f"{source} {self.shown(ids) if ids else 'nothing'}" for source, ids in self.sources.items())
            parts.append(
                f"what ends a turn differs: {', '.join(by_source)}; generation stops at all of them, and exports name all"
            )
        if self.text:
            parts.append(
                f"the chat template closes turns with the text {self.text!r}, which is not a single special token: only "
                f"{self.shown(self.ids)} can end a response"
            )
        return "; ".join(parts) or None

    def shown(self, ids: Iterable[int]) -> str:
        """Tokens for messages: their texts and ids."""
        names = {token: self.names.get(token) for token in ids}
        shown = (f"{name} ({token})" if name is not None else f"{token} (no token)" for token, name in names.items())
        return " and ".join(shown) or "nothing"


def find_ends(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, answers: Iterable[TokenizedAnswer] = (), whole: bool = False
) -> EndTokens:
    """Collect end-of-turn tokens from the model's files, the tokenizer, its chat template and the trained answers.

    Args:
        folder: the model folder.
        answers: trained answers; their masks show where a trained turn ends.
        whole: all tokens are trained (data.train_on=all), including other turns.

    Raises:
        ValueError: config.json or generation_config.json names a token that the model does not have.
    """
    special = special_ids(folder)
    sources = {file: ids for (file, key), ids in special.items() if key == "eos_token_id"}
    if tokenizer.eos_token_id is not None:
        sources[TOKENIZER] = (tokenizer.eos_token_id,)
    closing = template_end(tokenizer)
    if closing.token is not None:
        sources[TEMPLATE] = (closing.token,)
    known_ends = {token for ids in sources.values() for token in ids}
    trained_end_tokens = trained_ends(answers, tokenizer, known_ends, whole)
    if trained_end_tokens:
        sources[ANSWERS] = trained_end_tokens
    names = {token: _name(tokenizer, token) for ids in sources.values() for token in ids}
    return EndTokens(sources, names, closing.text)


def special_ids(folder: str | Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """(file, key) -> the special token ids in config.json and, if present, generation_config.json.

    A pad or begin token of -1 means none (an old convention).

    Raises:
        ValueError: not a token id of the model; names file, key and valid values.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG)
    files = {CONFIG: config}
    if (folder / GENERATION).is_file():
        files[GENERATION] = _read(folder / GENERATION)
    vocab = config.get("vocab_size")
    ids: dict[tuple[str, str], tuple[int, ...]] = {}
    for file, values in files.items():
        for key in SPECIAL_IDS:
            value = values.get(key)
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            if key != "eos_token_id" and value == -1:
                tokens = []
            for token in tokens:
                _check_id(token, vocab, f"{folder / file}: {key}={json.dumps(value)}")
            ids[file, key] = tuple(dict.fromkeys(tokens))
    return ids


def _check_id(token: Any, vocab: Any, setting: str) -> None:
    if type(token) is not int or token < 0:
        raise ValueError(f"{setting} is not a token id; use an integer from 0 on, a list of them, or null.")
    if type(vocab) is int and token >= vocab:
        raise ValueError(
            f"{setting}, but the model's vocab_size is {vocab}, so its tokens are 0 to {vocab - 1}; set the id that the "
            "model was trained with, or null."
        )


def template_end(tokenizer: PreTrainedTokenizerBase) -> TemplateEnd:
    """What the chat template appends to an assistant's answer; empty if there is no template, if it raises for all probes,
    or if it leaves turns open.

    Two conversations that differ only in the answer are rendered: their common suffix follows the answer. Its first
    special token is the end-of-turn token.
    """
    return _template_end(tokenizer, repr(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _template_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TemplateEnd:
    form, rendered = _rendered(tokenizer)
    if form is None:
        return TemplateEnd()
    tail = _common_suffix(*rendered)
    special, never = _special(tokenizer), _non_end_tokens(tokenizer)
    following = [token for token in tokenizer.encode(tail, add_special_tokens=False) if token in special]
    token = following[0] if following else None
    if token is None:
        return TemplateEnd(text=tail.strip())
    if token in never or _opens_a_turn(tokenizer, token, form, rendered):
        return TemplateEnd()
    return TemplateEnd(token)


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's own end token and that of its chat template."""
    candidates = (tokenizer.eos_token_id, template_end(tokenizer).token)
    return frozenset(token for token in candidates if token is not None)


def trained_ends(
    answers: Iterable[TokenizedAnswer],
    tokenizer: PreTrainedTokenizerBase,
    known: Iterable[int] = (),
    whole: bool = False,
) -> tuple[int, ...]:
    """Special tokens that end trained turns, most frequent first. A token that also occurs inside answers is excluded, unless
    it is in `known`.

    Args:
        known: tokens already known to end turns.
        whole: all tokens are trained, so turns also end inside the trained span.
    """
    special = _special(tokenizer) - _non_end_tokens(tokenizer)
    known = frozenset(known)
    ends: Counter[int] = Counter()
    inside: set[int] = set()
    for answer in answers:
        for start, stop in _trained_turns(answer.mask):
            last = answer.tokens[stop - 1]
            if last in special:
                ends[last] += 1
            inside |= special.intersection(answer.tokens[start : stop - 1])
    return tuple(token for token, _ in ends.most_common() if whole or token in known or token not in inside)


def special_among(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that are special tokens, which are not part of an answer's text."""
    special = _special(tokenizer)
    return tuple(token for token in ids if token in special)


def _trained_turns(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of trained tokens."""
    flags = bytes(mask)
    stop = 0
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield start, stop


def _rendered(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, list[str]]:
    """(index of the first form of conversation that the template accepts, both probes rendered in that form)."""
    for form in range(len(_forms(""))) if tokenizer.chat_template else ():
        texts = [_render(tokenizer, _forms(answer)[form]) for answer in PROBES]
        if texts[0] and texts[1] and texts[0] != texts[1]:  # a template that expects parts may silently drop plain text
            return form, [texts[0], texts[1]]
    return None, []


def _forms(answer: str) -> list[list[dict[str, Any]]]:
    """A question and its answer in the forms that templates accept; some require a system message, or lists of parts."""
    question: dict[str, Any] = {"role": "user", "content": QUESTION}
    answered: dict[str, Any] = {"role": "assistant", "content": answer}
    system: dict[str, Any] = {"role": "system", "content": "Be brief."}
    plain = [[question, answered], [system, question, answered]]
    return plain + [
        [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for messages in plain
    ]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception:  # templates raise any exception; a real conversation will report it
        return None
    return text if isinstance(text, str) else None


def _opens_a_turn(tokenizer: PreTrainedTokenizerBase, token: int, form: int, rendered: list[str]) -> bool:
    """Whether the token opens a turn rather than closes this one: it is the last special token before the answer, and
    follows the answer only if no other turn follows (a template that opens the next turn by itself)."""
    special = _special(tokenizer)
    before = _common_prefix(*rendered)
    header = [token_id for token_id in tokenizer.encode(before, add_special_tokens=False) if token_id in special]
    if header[-1:] != [token]:
        return False
    more = {**_forms("")[form][-2], "role": "user"}
    longer = [_render(tokenizer, [*_forms(answer)[form], more]) for answer in PROBES]
    if not longer[0] or not longer[1] or longer[0] == longer[1]:
        return False
    tail = tokenizer.encode(_common_suffix(longer[0], longer[1]), add_special_tokens=False)
    return next((token_id for token_id in tail if token_id in special), None) != token


def _common_prefix(left: str, right: str) -> str:
    return "".join(pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _common_suffix(left: str, right: str) -> str:
    return _common_prefix(left[::-1], right[::-1])[::-1]


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens and other added tokens, except those that are only whitespace."""
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    return frozenset(tokenizer.all_special_ids) | {token for token, text in added.items() if text.strip()}


def _non_end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens that never end a turn: begin, unknown, mask and cls."""
    names = ("bos_token_id", "unk_token_id", "mask_token_id", "cls_token_id")
    ids = (getattr(tokenizer, name, None) for name in names)
    return frozenset(token for token in ids if token is not None and token != tokenizer.eos_token_id)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str | None:
    if token >= len(tokenizer) and token not in tokenizer.added_tokens_decoder:
        return None
    name = tokenizer.convert_ids_to_tokens(token)
    return name if isinstance(name, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def generation_folder(folder: str | Path, ends: EndTokens, cache: Path) -> Path | None:
    """A folder for `vllm serve --generation-config` with the model's generation_config.json plus all end-of-turn tokens; None
    if vLLM already stops at all of them.

    Args:
        cache: parent folder; the result is named by a hash of its content.
    """
    file = Path(folder) / GENERATION
    content = _read(file) if file.is_file() else {}
    default_ids = ends.sources.get(GENERATION, ends.sources[CONFIG])  # vLLM falls back to config.json
    if set(ends.ids) <= {*default_ids, *ends.sources.get(TOKENIZER, ())}:  # vLLM always stops at the tokenizer's own
        return None
    text = json.dumps(content | {"eos_token_id": list(dict.fromkeys([*default_ids, *ends.ids]))}, indent=2) + "\n"
    folder_with_ends = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder_with_ends.mkdir(parents=True, exist_ok=True)
    temporary = folder_with_ends / f".{GENERATION}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder_with_ends / GENERATION)
    return folder_with_ends


def main(folder: str) -> None:
    """For launch/serve.sh: report disagreeing sources on stderr and print the `generation_folder`, if one is needed. A model that
    cannot be read is only reported: the server may support what cannot be trained."""
    from transformers import AutoTokenizer

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aligner" / "generation_config"
    try:
        ends = find_ends(folder, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        config_folder = generation_folder(folder, ends, cache)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        reason = " ".join(str(error).split())
        print(f"serve.sh: stop tokens are left to the server ({type(error).__name__}: {reason})", file=sys.stderr)
        return
    if ends.disagreement:
        print(f"serve.sh: {ends.disagreement}", file=sys.stderr)
    if config_folder:
        print(config_folder)


if __name__ == "__main__":
    main(sys.argv[1])
