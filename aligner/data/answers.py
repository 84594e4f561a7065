"""A prompt with its answer as the model would meet and produce them: token ids, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligner.data.end_tokens import closing_tokens
from aligner.data.tokenizer import Message, checked_messages, encode_continuation, encode_text, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("responses", "all")
TOO_LONG = ("error", "drop")
STOP = "stop"
"""Another word for data.too_long=error."""
SWITCHES = ("train", "weight")
"""Keys of a message that say whether it is trained on: true or false, 1 or 0."""


@dataclass(frozen=True)
class Answered:
    """One sequence of prompt and answer, perhaps of several turns."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    mask: tuple[bool, ...]
    """Per token: trained on (an answer and its end token), or only read. Never the first: nothing predicts it."""
    prompt_len: int
    """Tokens before the first answer that is trained on."""
    fields: dict[str, Any]
    """The whole JSON row, and what is known of this answer ('score', 'label')."""
    index: int = 0
    """Position among the rows (or pairs) of its kind that were kept, from 0."""


def encode_answer(
    row: dict[str, Any], keys: tuple[str, str], label: str, tokenizer: PreTrainedTokenizerBase, train_on: str
) -> Answered:
    """The row's prompt and answer: two texts, or two lists of messages.

    Args:
        keys: where they stand in the row, such as ("prompt", "completion").
        train_on: "responses" (the answer's assistant turns) or "all" (every token but the first).

    Raises:
        ValueError: wrong types, an empty part, or messages that do not form prompt and answer; `label` is named.
    """
    prompt, answer = (row[key] for key in keys)
    if isinstance(prompt, list) and isinstance(answer, list):
        begin, rest = (checked_messages(row[key], label, key) for key in keys)
        if begin[-1]["role"] == "assistant":
            raise ValueError(f"{label}: {keys[0]!r} ends with an assistant's turn; it must leave it to {keys[1]!r}.")
        if rest[0]["role"] != "assistant" or rest[-1]["role"] != "assistant":
            raise ValueError(f"{label}: {keys[1]!r} must begin and end with an assistant's turn.")
        places = [f"{keys[0]}[{i}]" for i in range(len(begin))] + [f"{keys[1]}[{i}]" for i in range(len(rest))]
        return encode_turns([*begin, *rest], places, len(begin), label, tokenizer, train_on, row)
    for key in keys:
        if not isinstance(row[key], str):
            lists = any(isinstance(part, list) for part in (prompt, answer))
            hint = f" (messages: give {keys[0]!r} and {keys[1]!r} as lists of them)" if lists else ""
            raise ValueError(f"{label}: {key!r} must be text, not {type(row[key]).__name__}{hint}.")
        if not row[key].strip():
            raise ValueError(f"{label}: {key!r} is empty.")
    # Encoded apart: in generation the prompt stands alone, so no token may reach across the border.
    read = encode_text(tokenizer, prompt)
    trained = encode_continuation(tokenizer, answer)
    if not closing_tokens(tokenizer).intersection(trained[-1:]):
        trained.append(_end(tokenizer))
    return _answered(read + trained, [train_on == "all"] * len(read) + [True] * len(trained), len(read), label, row)


def encode_turns(
    messages: Sequence[Message],
    places: Sequence[str],
    first: int,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
    fields: dict[str, Any],
) -> Answered:
    """A conversation. Each assistant's turn from message `first` on is an answer unless it has "train": false or
    "weight": 0: what the template adds when that turn is appended to the conversation before it. What follows the last
    answer is left out.

    Args:
        places: where each message stands in the row, for the errors.

    Raises:
        ValueError: no answer or an empty one, a switch that cannot be followed, or a template that rewrites earlier
            turns.
    """
    on = [_switch(message, f"{label}: {place}", train_on) for message, place in zip(messages, places, strict=True)]
    messages = [{key: value for key, value in message.items() if key not in SWITCHES} for message in messages]
    spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [turn for turn in spoken if turn >= first and on[turn]]
    if not answers:
        raise ValueError(f'{label}: no turn is trained on; leave "train" or "weight" out of one assistant\'s turn.')
    others = train_on == "all"
    whole = render_chat(tokenizer, messages, label, add_generation_prompt=False)
    tokens: list[int] = []
    mask: list[bool] = []
    done, prompt_len, closed = "", 0, False
    for turn in answers if not others else [turn for turn in spoken if turn in answers or not on[turn]]:
        if turn > answers[-1]:
            break
        if turn in answers and not messages[turn]["content"].strip():
            raise ValueError(f"{label}: {places[turn]} is an assistant's turn with an empty 'content'.")
        before = render_chat(tokenizer, messages[:turn], label, add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: turn + 1], label, add_generation_prompt=False)
        # A template may write a turn otherwise once more follows (dropped reasoning); then the tokens would be wrong.
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"{label}: the chat template does not write the turns up to {places[turn]} as a beginning of the whole "
                "conversation; give one row for each assistant's turn, or another chat_template."
            )
        read = encode_continuation(tokenizer, before[len(done) :])
        answer, blanks, closed = _split_turn(encode_continuation(tokenizer, after[len(before) :]), tokenizer)
        if turn == answers[0]:
            prompt_len = len(tokens) + len(read)
        tokens += read + answer + blanks
        mask += [others] * len(read) + [turn in answers] * len(answer) + [others] * len(blanks)
        done = after
    if not closed:  # the template ends the last turn with no special token: else nothing teaches to stop
        tokens.append(_end(tokenizer))
        mask.append(True)
    return _answered(tokens, mask, prompt_len, label, fields)


def fits(answered: Answered, what: str, label: str, max_tokens: int, too_long: str) -> bool:
    """Whether it has at most `max_tokens` tokens.

    Raises:
        ValueError: it has more, and `too_long` (data.too_long) is not "drop".
    """
    length = len(answered.tokens)
    if length > max_tokens and too_long != "drop":
        raise ValueError(
            f"{label}: {what} has {length} tokens, more than data.max_tokens={max_tokens}; "
            f"raise it to {length} or more, or set data.too_long=drop."
        )
    return length <= max_tokens


def check_choices(too_long: str, train_on: str = "responses") -> None:
    """Raises ValueError for a value of data.too_long or data.train_on that is unknown."""
    for name, value, known in (("too_long", too_long, TOO_LONG), ("train_on", train_on, TRAIN_ON)):
        if value not in known and (name, value) != ("too_long", STOP):
            raise ValueError(f"data.{name}={value} is unknown; use {' or '.join(known)}.")


def _answered(tokens: list[int], mask: list[bool], prompt_len: int, label: str, fields: dict[str, Any]) -> Answered:
    if prompt_len == 0:
        raise ValueError(f"{label}: the prompt has no tokens.")
    return Answered(tuple(tokens), (False, *mask[1:]), prompt_len, fields)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer refuses a tokenizer without one"
    return tokenizer.eos_token_id


def _switch(message: Message, place: str, train_on: str) -> bool:
    """Whether the message may be trained on.

    Raises:
        ValueError: not one of true, false, 1, 0, two switches that differ, or one that `train_on` cannot follow.
    """
    given = {key: message[key] for key in SWITCHES if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{place}: {key!r} must be true or false (or 1 or 0), not {value!r}.")
    if len(set(map(bool, given.values()))) == 2:
        raise ValueError(f"{place}: 'train' and 'weight' say different things; give one of them.")
    on = all(given.values())
    if given and message["role"] != "assistant" and on != (train_on == "all"):
        raise ValueError(
            f"{place} is no assistant's turn and has {given}, but with data.train_on={train_on} such turns are "
            f"{'never' if on else 'always'} trained on; use data.train_on={'all' if on else 'responses'}, or leave it "
            "out."
        )
    return on


def _split_turn(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], bool]:
    """A turn -> (what the model produces, the blanks that the template adds after the turn's closing token, whether
    there is such a token)."""
    special = closing_tokens(tokenizer).union(
        tokenizer.all_special_ids
    )  # an added token may be special in one file only
    end = len(tokens)
    while end and tokens[end - 1] not in special and not str(tokenizer.decode([tokens[end - 1]])).strip():
        end -= 1
    closed = end > 0 and tokens[end - 1] in special
    return (tokens[:end], tokens[end:], True) if closed else (tokens, [], False)
